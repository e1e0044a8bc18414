# Copyright 2026 The ChatGLM Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""How does all of it become one application?"""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .errors import RequestError, error_response
from .guard import Guard, Limits
from .metrics import Metrics
from .models import Models
from .openai_door import build_openai_door
from .tutorial_door import build_tutorial_door


logger = logging.getLogger("uvicorn.error")


def build_app(models: Models, metrics: Metrics, limits: Limits, api_keys: tuple[str, ...] = ()) -> Guard:
    """The application of a server; when it shuts down, the engines of the models stop.

    Args:
        models: what is served.
        metrics: the counters that the models have.
        api_keys: who may come in; without any, everybody.
    """
    app = build_openai_door(models)
    app.include_router(build_tutorial_door(models))

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def show_metrics() -> Response:
        return metrics.response()

    add_error_handlers(app)
    return Guard(app, limits, api_keys, metrics)


def add_error_handlers(app: FastAPI) -> None:
    """Every error in the form of the door it happened in."""

    async def refuse(request: Request, error: Any) -> JSONResponse:
        return error_response(request.url.path, error)

    async def refuse_http(request: Request, error: Any) -> JSONResponse:
        return error_response(request.url.path, RequestError(str(error.detail), status=error.status_code))

    async def refuse_body(request: Request, error: Any) -> JSONResponse:
        message = "The body must be a JSON object, sent as 'Content-Type: application/json'."
        return error_response(request.url.path, RequestError(message))

    async def fail(request: Request, error: Any) -> JSONResponse:
        # Its text may hold paths of this machine, or what somebody wrote.
        logger.error("%s failed", request.url.path, exc_info=error)
        return error_response(request.url.path, RequestError("The server failed; its log says why.", status=500))

    app.add_exception_handler(RequestError, refuse)
    app.add_exception_handler(HTTPException, refuse_http)
    app.add_exception_handler(RequestValidationError, refuse_body)
    app.add_exception_handler(Exception, fail)

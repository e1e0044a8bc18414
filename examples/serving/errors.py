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
"""What each door says when something is wrong: OpenAI's form below `/v1`, the tutorials' elsewhere."""

import datetime
from typing import Any

from starlette.responses import JSONResponse


# OpenAI's names; what is not listed is `invalid_request_error` below 500 and `server_error` from there.
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that cannot be answered, with the HTTP status and what OpenAI's form says about it.

    Args:
        message: what is wrong and what would be right.
        param: the field of the request.
        code: OpenAI's short name of the error, where it has one.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


def error_body(path: str, error: RequestError) -> dict[str, Any]:
    """The JSON of an error, in the form of the door that `path` leads to."""
    if path.startswith("/v1"):
        kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
        return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
    return {"response": "", "history": [], "status": error.status, "time": now(), "error": error.message}


def error_response(path: str, error: RequestError) -> JSONResponse:
    """An error as a response; a client that was refused for want of room is told when to come again."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(path, error), error.status, headers)


def now() -> str:
    """The time as the tutorials write it."""
    return datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")

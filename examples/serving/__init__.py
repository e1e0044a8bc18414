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
"""The parts of `examples/serve.py`, one server for the published checkpoints with three doors on one port, and of
`examples/web_demo.py`, a chat in the browser.

| file | question |
|---|---|
| `models.py` | which models are served, and under which names? |
| `engines.py` | how are answers generated: many in one batch, or one after the other? |
| `sampling.py` | how is the next token chosen, for each request its own way? |
| `answers.py` | how do ids become text while they come, and when does it end? |
| `reading.py` | how is an answer read while it comes? |
| `pictures.py` | which pictures may a request bring? |
| `picture_files.py` | what is a picture in a data address? |
| `requests.py` | what may a request ask for? |
| `errors.py` | what does each door say when something is wrong? |
| `openai_door.py` | OpenAI's `/v1`, on the server that comes with Transformers |
| `tutorial_door.py` | the POST API of the tutorials |
| `guard.py` | who may come in, how much at once, and what if a client goes away? |
| `metrics.py` | what does the server count? |
| `app.py` | how does all of it become one application? |
| `web_page.py` | what is on the web page, and what happens when a visitor does something? |
| `web_conversation.py` | how is a conversation changed, shown and kept? |
| `web_answers.py` | how is a conversation on the page answered? |
| `web_loading.py` | how far is the model that the page waits for? |
| `vllm_tool_parser.py` | how does vLLM's server read an answer? (a plug-in for it; nothing here imports it) |
| `web_texts.py` | what does the page say, in either language? |

What is unusual here:

- Every answer is an `AnswerStream`, whoever asked for it and however it is generated. It belongs to the event loop; the
  threads that generate hand it ids.
- `openai_door.py` is the only file that imports the server of Transformers, whose modules are not a public interface.
- Nothing here is copied into a checkpoint folder, and nothing that a model writes is executed.
"""

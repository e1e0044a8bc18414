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
"""The words of the web page, in English and in Chinese."""

# By language, then by what the words are for. Words in braces are filled in.
TEXTS = {
    "en": {
        "other_language": "中文",
        "new_chat": "New chat",
        "chats": "Chats",
        "settings": "Settings",
        "system": "System prompt",
        "system_hint": "How the model is to behave",
        "max_length": "Length (tokens)",
        "temperature": "Temperature",
        "top_p": "Top-p",
        "tools": "Tools",
        "functions": "Functions of this page",
        "functions_info": "They run by themselves when the model calls them",
        "descriptions": "Tools of your own",
        "descriptions_info": "A JSON list of descriptions. When the model calls one, type its result.",
        "question": "Ask something",
        "attach": "Attach a picture",
        "picture": "Picture",
        "no_picture": "This picture was not kept.",
        "one_picture": "A conversation can have one picture. Start a new chat for another.",
        "stop": "Stop",
        "result": "The result of {name}",
        "call": "Call of {name}",
        "result_of": "Result of {name}",
        "welcome": "### {model}\nWhat would you like to know?",
        "loading": "Loading the model",
        "bad_descriptions": "The tools must be a JSON list of descriptions: {error}",
        "too_long": "A message can have {limit} characters at most.",
        "failed": "The model could not be loaded: {error}",
    },
    "zh": {
        "other_language": "English",
        "new_chat": "新对话",
        "chats": "历史对话",
        "settings": "设置",
        "system": "系统提示词",
        "system_hint": "希望模型如何表现",
        "max_length": "最大长度（token）",
        "temperature": "温度",
        "top_p": "Top-p",
        "tools": "工具",
        "functions": "本页自带的函数",
        "functions_info": "模型调用时自动执行",
        "descriptions": "自定义工具",
        "descriptions_info": "JSON 列表，每项描述一个工具。模型调用后，请输入调用结果。",
        "question": "请输入问题",
        "attach": "添加图片",
        "picture": "图片",
        "no_picture": "这张图片没有保存。",
        "one_picture": "一个对话只能有一张图片。请为另一张图片新建对话。",
        "stop": "停止",
        "result": "{name} 的结果",
        "call": "调用 {name}",
        "result_of": "{name} 的结果",
        "welcome": "### {model}\n有什么可以帮你的吗？",
        "loading": "正在加载模型",
        "bad_descriptions": "工具必须是由描述组成的 JSON 列表：{error}",
        "too_long": "一条消息最多 {limit} 个字符。",
        "failed": "模型加载失败：{error}",
    },
}


def pick_language(wanted: object) -> str:
    """The language of the page for what a browser asks for, such as `zh-CN`: Chinese or else English."""
    return "zh" if str(wanted).lower().startswith("zh") else "en"


__all__ = ["TEXTS", "pick_language"]

// What the page says, in English and Chinese. Every text remembers its key, so that switching the
// language changes what is on the page without drawing it anew.

import { asText, read, write } from "./storage.js";

const WORDS = {
  en: {
    about: "Small models make mistakes. Check what matters.",
    answer: "Answer",
    answering: "Answering…",
    arguments: "Arguments",
    assistantSays: "Answer",
    back: "The server is back.",
    badNumber: "A number from {min} to {max}, or empty.",
    badTools: "This is not a JSON list of tools.",
    broken: "The server sent something that this page does not understand: {detail}",
    byDefault: "default",
    cancel: "Cancel",
    chats: "Conversations",
    close: "Close",
    code: "Code",
    contextUsed: "{used} of {all} tokens of the context used",
    conversation: "Conversation",
    copied: "Copied",
    copyAnswer: "Copy the answer",
    copyCode: "Copy the code",
    copyQuestion: "Copy the question",
    cut: "The connection ended before the answer did.",
    delete: "Delete",
    deleted: "Deleted “{title}”",
    edit: "Edit",
    editQuestion: "Edit the question; what follows is replaced",
    elsewhere: "This conversation is being answered in another tab.",
    failed: "The server failed: {detail}",
    firstToken: "first token after {seconds} s",
    full: "The server has as many requests as it takes. Try again in {seconds} s.",
    gone: "The server does not answer.",
    goneWait: "The server does not answer. Trying again until it does…",
    hello: "What would you like to know?",
    image: "image",
    key: "Key",
    keyAsk: "This server wants a key",
    keyHint: "It stays in this tab, until you close it.",
    keyWrong: "The server did not take this key.",
    keyNeeded: "The server wants a key.",
    language: "中文",
    latest: "To the latest",
    length: "ended at the limit of tokens",
    maxTokens: "Max tokens",
    menu: "Conversations",
    message: "Message",
    messageHint: "Ask something",
    messageKeys: "Enter sends · Shift+Enter breaks the line · Esc stops",
    model: "Model",
    modelSize: "{parameters} parameters, reads up to {context} tokens",
    newChat: "New conversation",
    noModels: "The server has no model.",
    notCopied: "Not copied",
    off: "Off",
    on: "On",
    questionSays: "Question",
    quota:
      "The browser's storage is full: what is new is lost when you close this page. Delete some conversations.",
    regenerate: "Answer again",
    refused: "The server refused: {detail}",
    rename: "Rename",
    reset: "Back to the defaults",
    result: "Result of {name}",
    sampling: "Sampling",
    samplingHint: "For all conversations. What is empty is as the server has it.",
    save: "Save and ask",
    seed: "Seed",
    seedHint: "The same seed gives the same answer.",
    send: "Send",
    sendResults: "Send the results",
    settings: "Settings",
    signIn: "Continue",
    skip: "To the message box",
    stop: "Stop",
    stopped: "stopped",
    suggestion1: "What can you do?",
    suggestion2: "What is 45 + 17?",
    suggestion3: "What is the capital of France?",
    suggestion4: "What is 'apple' in Chinese?",
    system: "System prompt",
    systemHint: "For this conversation: who the model is, how it answers.",
    table: "Table",
    temperature: "Temperature",
    themeAuto: "Colours: as the system",
    themeDark: "Colours: dark",
    themeLight: "Colours: light",
    thinking: "Thinking…",
    thinkingSetting: "Thinking",
    thought: "Thoughts",
    thoughtFor: "Thought for {seconds} s",
    title: "Chat",
    tokens: "{count} tokens",
    tokensOne: "1 token",
    tokensPerSecond: "{rate} tokens/s",
    toolCall: "Calls {name}",
    tools: "Tools",
    toolsHint: "A JSON list in OpenAI's form. You give the results.",
    tooLong:
      "The conversation no longer fits the model's context. Start a new one, or edit a question further up. ({detail})",
    topK: "Top k",
    topP: "Top p",
    tryAgain: "Try again",
    undo: "Undo",
    untitled: "New conversation",
  },
  zh: {
    about: "小模型会出错，重要的内容请核对。",
    answer: "回答",
    answering: "正在回答……",
    arguments: "参数",
    assistantSays: "回答",
    back: "服务器已恢复。",
    badNumber: "请填 {min} 到 {max} 之间的数，或留空。",
    badTools: "这不是工具的 JSON 列表。",
    broken: "服务器发来了本页面看不懂的内容：{detail}",
    byDefault: "默认",
    cancel: "取消",
    chats: "对话",
    close: "关闭",
    code: "代码",
    contextUsed: "上下文已用 {used} / {all} 个 token",
    conversation: "对话",
    copied: "已复制",
    copyAnswer: "复制回答",
    copyCode: "复制代码",
    copyQuestion: "复制问题",
    cut: "回答还没有结束，连接就断了。",
    delete: "删除",
    deleted: "已删除“{title}”",
    edit: "编辑",
    editQuestion: "编辑问题，其后的内容会被替换",
    elsewhere: "另一个标签页正在回答这个对话。",
    failed: "服务器出错：{detail}",
    firstToken: "首个 token 用时 {seconds} 秒",
    full: "服务器的请求已满，请在 {seconds} 秒后再试。",
    gone: "服务器没有响应。",
    goneWait: "服务器没有响应，正在不断重试……",
    hello: "想了解些什么？",
    image: "图片",
    key: "密钥",
    keyAsk: "这台服务器需要密钥",
    keyHint: "密钥只保存在这个标签页里，关闭后即清除。",
    keyWrong: "服务器不接受这个密钥。",
    keyNeeded: "服务器需要密钥。",
    language: "English",
    latest: "到最新处",
    length: "达到 token 上限而结束",
    maxTokens: "最多 token 数",
    menu: "对话列表",
    message: "消息",
    messageHint: "问点什么",
    messageKeys: "Enter 发送 · Shift+Enter 换行 · Esc 停止",
    model: "模型",
    modelSize: "{parameters} 参数，最多读 {context} 个 token",
    newChat: "新对话",
    noModels: "服务器上没有模型。",
    notCopied: "没有复制成功",
    off: "关",
    on: "开",
    questionSays: "问题",
    quota: "浏览器的存储已满：关闭页面后新内容会丢失。请删除一些对话。",
    regenerate: "重新回答",
    refused: "服务器拒绝了请求：{detail}",
    rename: "重命名",
    reset: "恢复默认",
    result: "{name} 的结果",
    sampling: "采样",
    samplingHint: "对所有对话有效。留空则用服务器的默认值。",
    save: "保存并提问",
    seed: "随机种子",
    seedHint: "种子相同，回答相同。",
    send: "发送",
    sendResults: "发送结果",
    settings: "设置",
    signIn: "继续",
    skip: "跳到输入框",
    stop: "停止",
    stopped: "已停止",
    suggestion1: "你能做什么？",
    suggestion2: "45加17等于几？",
    suggestion3: "法国的首都是哪里？",
    suggestion4: "“苹果”用英语怎么说？",
    system: "系统提示词",
    systemHint: "只对本对话有效：模型是谁，怎样回答。",
    table: "表格",
    temperature: "温度",
    themeAuto: "配色：跟随系统",
    themeDark: "配色：深色",
    themeLight: "配色：浅色",
    thinking: "思考中……",
    thinkingSetting: "思考",
    thought: "思考过程",
    thoughtFor: "思考了 {seconds} 秒",
    title: "聊天",
    tokens: "{count} 个 token",
    tokensOne: "1 个 token",
    tokensPerSecond: "每秒 {rate} 个 token",
    toolCall: "调用 {name}",
    tools: "工具",
    toolsHint: "OpenAI 格式的 JSON 列表，结果由你填写。",
    tooLong: "对话超出了模型的上下文长度。请开始新对话，或编辑前面的问题。（{detail}）",
    topK: "Top k",
    topP: "Top p",
    tryAgain: "重试",
    undo: "撤销",
    untitled: "新对话",
  },
};
const SAID_ATTRIBUTES = ["aria-label", "title", "placeholder"];

const chosen = read("language", null);
const ofBrowser = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
let language = Object.keys(WORDS).includes(chosen) ? chosen : ofBrowser;

/** The text of a key, with {name} replaced by the value of that name; else the key. */
export function t(key, values = {}) {
  const words = Object.hasOwn(WORDS[language], key) ? WORDS[language][key] : key;
  return words.replace(/\{(\w+)\}/g, (_, name) => {
    const value = values[name];
    if (typeof value === "number") return new Intl.NumberFormat(language).format(value);
    return asText(value);
  });
}

export function say(node, key, values) {
  node.dataset.say = key;
  node.dataset.values = JSON.stringify(values ?? {});
  node.textContent = t(key, values);
}

export function sayAttribute(node, attribute, key, values) {
  node.setAttribute(`data-say-${attribute}`, key);
  if (values) node.dataset.values = JSON.stringify(values);
  node.setAttribute(attribute, t(key, values));
}

const valuesOf = (node) => JSON.parse(node.dataset.values || "{}");

/** Say everything that is on the page in the present language. */
export function sayAll() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-say]"))
    node.textContent = t(node.dataset.say, valuesOf(node));
  for (const attribute of SAID_ATTRIBUTES)
    for (const node of document.querySelectorAll(`[data-say-${attribute}]`))
      node.setAttribute(attribute, t(node.getAttribute(`data-say-${attribute}`), valuesOf(node)));
}

export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  write("language", language);
  sayAll();
}

export const currentLanguage = () => language;

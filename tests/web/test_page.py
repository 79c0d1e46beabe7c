"""The page to chat on, in a real Chromium: against a stand-in that sends what no real model would
on demand."""

import hashlib
import json
import re
import threading

import pytest

pytest.importorskip("playwright", reason="no playwright: pip install -r requirements-dev.txt")
pytest.importorskip("axe_playwright_python", reason="no axe: pip install -r requirements-dev.txt")

from axe_playwright_python.sync_playwright import Axe
from pages import Answers, open_browser
from playwright.sync_api import expect
from stand_in import DONE, MODEL, WEB, Refusal, StandIn, event, said

HTML = (
    '<script>window.broken = 1</script><img src=x onerror="window.broken = 1"><iframe'
    ' src="https://example.org"></iframe><style>* {display: none}</style><b onclick=x>bold</b>'
)
DOCUMENT = """# A title

A paragraph with **bold**, *italic*, ~~gone~~, `code <b>`, a\\*star, &lt;tag&gt; &#20320; and
a second line. <https://example.org/a?b=1&c=2>, https://example.org, me@example.org

- one
- two

  still two
  1. inner
  2. inner
- [x] done

1. first

2. second

```python
def f(x):
    return x < 1 && x > 0

```

| a | b |
|:-:|--:|
| 1 | `2` |
| 你好 | **3** |

> quoted
> > twice

---

<div onclick="x">
html
</div>

    indented code

[reference][r] and ![picture](https://example.org/x.png)

[r]: https://example.org/r
"""


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def running_stand_in():
    server = StandIn()
    yield server
    server.close()


@pytest.fixture
def server(running_stand_in):
    running_stand_in.restart()
    return running_stand_in


@pytest.fixture
def read(browser, server):
    """read(**options) -> a Reader of the stand-in's page; checked at the end of the test."""
    with Answers(browser) as answers:
        yield lambda **options: answers.open(server.url, **options)


# --------------------------------------------------------------------------------------------------
# What a model writes
# --------------------------------------------------------------------------------------------------


def test_html_in_whatever_a_server_sends_is_text(read, server):
    server.models = [MODEL | {"id": HTML}, MODEL]

    def reply(body):
        yield event({"reasoning_content": HTML})
        yield event({"content": f"{HTML}\n\n{HTML}\n\n- {HTML}\n\n```{HTML}\n{HTML}\n```\n"})
        call = {"index": 0, "id": HTML, "function": {"name": HTML, "arguments": HTML}}
        yield event({"tool_calls": [call]})
        yield b"data: " + json.dumps({"error": {"message": HTML}}).encode() + b"\n\n"

    server.reply = reply
    reader = read()
    reader.ask(HTML)
    page = reader.page
    expect(page.locator(".error")).to_contain_text(HTML)
    page.reload()
    expect(page.locator(".tool-call").first).to_contain_text(HTML)
    made = "script, img, iframe, style, b, [onclick], [style]"
    assert (
        page.locator(f"#messages :is({made}), #chats :is({made}), header :is({made})").count() == 0
    )
    assert page.evaluate("window.broken") is None
    for place in (".question", ".body p", ".thoughts-body", ".code code", "#chats"):
        expect(page.locator(place).first).to_contain_text("<script>window.broken = 1</script>")


def test_links_lead_to_the_web_alone(read, server):
    bad = [
        "javascript:alert(1)",
        "data:text/html,x",
        "file:///etc/passwd",
        "/v1/models",
        "x",
        "//x",
    ]
    bad += ["JaVaScRiPt:alert(1)", "&#106;avascript:alert(1)", "vbscript:x", "blob:x"]
    text = "".join(f"[bad{n}]({href})\n\n" for n, href in enumerate(bad))
    text += (
        "[good](https://example.org/a)\n\n![picture](https://example.org/b.png)\n\nme@example.org"
    )
    server.reply = lambda body: said(text)
    reader = read()
    reader.ask("links")
    reader.wait_for_answer()
    links = reader.page.locator("#messages a")
    hrefs = [link.get_attribute("href") for link in links.all()]
    assert hrefs == ["https://example.org/a", "https://example.org/b.png", "mailto:me@example.org"]
    assert {link.get_attribute("rel") for link in links.all()} == {"noopener noreferrer"}
    expect(reader.answers.last).to_contain_text("[bad0](javascript:alert(1))")


def test_a_line_of_a_megabyte_is_plain_text(read, server):
    line = "x <b>*y* " * 120_000
    server.reply = lambda body: said("# Title\n\nfirst\n\n" + line + "\n\n**last**", 50_000)
    reader = read()
    reader.ask("long")
    reader.wait_for_answer()
    assert reader.page.locator(".plain").evaluate("node => node.textContent").endswith("**last**")
    assert line in reader.page.locator(".body").evaluate("node => node.textContent")
    expect(reader.page.locator(".body h3")).to_have_text("Title")
    reader.page.reload()  # 1 MB fits the browser's storage
    assert line in reader.page.locator(".body").evaluate("node => node.textContent")


def test_broken_utf_8_is_shown_as_such(read, server):
    def reply(body):
        whole = event({"content": "你好 PLACE end"})
        yield whole.replace(b"PLACE", b"\xff\xfe\xe4\xbd")
        text = 'data: {"choices":[{"index":0,"delta":{"content":"天"}}]}\r\n\r\n'.encode()
        for byte in text:  # characters in pieces
            yield bytes([byte])
        yield event({}, "stop") + DONE

    server.reply = reply
    reader = read()
    reader.ask("bytes")
    reader.wait_for_answer()
    expect(reader.page.locator(".body")).to_have_text("你好 \ufffd\ufffd\ufffd end天")


def test_what_markdown_could_choke_on(read, server):
    texts = ["> " * 8000, "1. " * 3000, "[" * 9000, "*a **b " * 1400, "\n> " * 9000, "| " * 4000]
    server.reply = lambda body: said(texts[int(body["messages"][-1]["content"])], 3000)
    reader = read()
    for n in range(len(texts)):
        reader.ask(str(n))
        expect(reader.page.locator(".stats")).to_have_count(n + 1)
    assert [message["content"] for message in reader.saved()["messages"]][1::2] == texts


@pytest.mark.parametrize("size", [1, 3, 50])
def test_text_that_streams_ends_up_as_text_that_is_there(read, size):
    page = read().page
    drawn = """async ([text, size]) => {
        const { MarkdownView } = await import("./markdown.js");
        const draw = (size) => {
            const box = document.createElement("div");
            const view = new MarkdownView(box);
            for (let end = size; end < text.length; end += size) view.update(text.slice(0, end), false);
            view.update(text, true);
            return box.innerHTML;
        };
        return [draw(size), draw(text.length)];
    }"""
    # Links by reference are known only at the end
    text = DOCUMENT.replace("[reference][r] and", "") + "\r\nwindows\r\n\r\nlines"
    streamed, whole = page.evaluate(drawn, [text, size])
    assert streamed == whole
    for made in ("<h3>A title</h3>", "<del>gone</del>", "code &lt;b&gt;", "a*star, &lt;tag&gt; 你"):
        assert made in whole
    for made in ('<td class="align-right">', "☑ ", "<p>still two</p>", "&lt;div onclick"):
        assert made in whole


def test_blocks_that_are_complete_are_not_drawn_again(read):
    page = read().page
    kept = page.evaluate(
        """async () => {
        const { MarkdownView } = await import("./markdown.js");
        const box = document.createElement("div");
        const view = new MarkdownView(box);
        let text = "first\\n\\nsecond\\n\\n```\\ncode";
        view.update(text, false);
        const nodes = [...box.children];
        const code = box.querySelector("code");
        for (let n = 0; n < 50; n++) view.update((text += ` word ${n}\\n`), false);
        view.update(text + "```\\n\\nlast", true);
        return [nodes.every((node, n) => box.children[n] === node), box.contains(code), view.settled];
    }"""
    )
    assert kept[:2] == [True, True] and kept[2] >= len("first\n\n")


def test_thoughts_are_folded(read, server):
    go_on = threading.Event()

    def reply(body):
        yield event({"reasoning_content": "let me *think*"})
        go_on.wait(20)
        yield from said("done")

    server.reply = reply
    reader = read()
    reader.ask("think")
    thoughts = reader.page.locator("details")
    expect(thoughts.locator("summary")).to_have_text("Thinking…")
    expect(thoughts.locator("em")).to_be_hidden()
    thoughts.locator("summary").click()
    expect(thoughts.locator("em")).to_be_visible()
    go_on.set()
    reader.wait_for_answer()
    expect(thoughts.locator("summary")).to_contain_text("Thought")
    expect(thoughts.locator("em")).to_be_visible()  # still open


def test_tool_calls_are_shown_and_take_results(read, server):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

    def reply(body):
        if body["messages"][-1]["role"] == "tool":
            return said("It rains.")
        start = {"index": 0, "id": "c1", "function": {"name": "weather", "arguments": ""}}
        parts = [event({"tool_calls": [start]})]
        for text in ('{"city"', ': "Rome"}'):
            parts.append(event({"tool_calls": [{"index": 0, "function": {"arguments": text}}]}))
        return iter([*parts, event({}, "tool_calls"), DONE])

    server.reply = reply
    reader = read()
    page = reader.page
    page.click("#open-settings")
    page.fill("#tools", "no list")
    expect(page.locator("#tools-error")).to_be_visible()
    page.fill("#tools", json.dumps([tool]))
    expect(page.locator("#tools-error")).to_be_hidden()
    page.keyboard.press("Escape")
    reader.ask("weather?")
    expect(page.locator(".tool-name")).to_have_text("Calls weather")
    expect(page.locator(".tool-call pre")).to_have_text('{\n  "city": "Rome"\n}')
    page.get_by_label("Result of weather").fill("rain")
    page.get_by_role("button", name="Send the results").click()
    expect(page.locator(".answer").last).to_contain_text("It rains.")
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert server.bodies[0]["tools"] == [tool]
    assert server.bodies[1]["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize("how", ["length", "stopped", "no JSON", "a list", "skipped"])
def test_calls_that_are_cut_short_are_not_sent(read, server, how):
    arguments = {"length": "{}", "a list": "[1]", "skipped": "{}"}.get(how, '{"a": 1')
    call = {"id": "c", "function": {"name": "add", "arguments": arguments}}
    go_on = threading.Event()

    def reply(body):
        if len(body["messages"]) > 1:
            yield from said("ok")
            return
        yield event({"tool_calls": [{"index": 1 if how == "skipped" else 0, **call}]})
        if how == "stopped":
            go_on.wait(20)
        yield event({}, "length" if how == "length" else "tool_calls") + DONE

    server.reply = reply
    reader = read()
    page = reader.page
    reader.ask("1 + 1")
    if how == "stopped":
        expect(page.locator(".streaming .waiting")).to_have_count(0)
        page.keyboard.press("Escape")
        go_on.set()
    expect(page.locator(".tool-call")).to_have_count(1)
    if how == "skipped":
        page.get_by_label("Result of add").fill("2")
        page.get_by_role("button", name="Send the results").click()
    else:
        expect(page.get_by_role("button", name="Send the results")).to_have_count(0)
        reader.ask("then?")
    expect(reader.answers.last).to_have_text("ok")
    call |= {"type": "function"}
    sent = {"role": "user", "content": "then?"}
    result = {"role": "tool", "content": "2", "tool_call_id": "c"}
    calls = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert server.bodies[1]["messages"][1:] == ([calls, result] if how == "skipped" else [sent])


# --------------------------------------------------------------------------------------------------
# What goes wrong
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusal", "words", "help_"),
    [
        (Refusal(429, "queue", Retry_After="7"), "Try again in 7 s", "Try again"),
        (
            Refusal(400, "2102 tokens", "context_length_exceeded"),
            "no longer fits the model's context",
            "New conversation",
        ),
        (Refusal(400, "top_k: <b>no</b>"), "The server refused: top_k: <b>no</b>", "Try again"),
        (Refusal(500, "sorry"), "The server failed: sorry", "Try again"),
        (Refusal(503, "closing"), "does not answer", "Try again"),
    ],
    ids=["full", "context", "refused", "failed", "closing"],
)
def test_refusals_are_said_in_words(read, server, refusal, words, help_):
    def refuse(body):
        raise refusal

    server.reply = refuse
    reader = read(may_fail=True)
    reader.ask("hello")
    expect(reader.page.locator(".error")).to_contain_text(words)
    server.reply = lambda body: said("here again")
    reader.page.locator(".error").get_by_role("button", name=help_).click()
    if help_ == "Try again":
        expect(reader.answers).to_have_text([re.compile("here again")])
        assert len(reader.saved()["messages"]) == 2
    else:
        expect(reader.page.locator("#welcome")).to_be_visible()
    # What failed is no part of what the model reads
    reader.ask("and now?")
    reader.wait_for_answer()
    assert all(message["content"] for message in server.bodies[-1]["messages"])


@pytest.mark.parametrize("kind", ["cut", "error", "nonsense"])
def test_streams_that_break_keep_what_came(read, server, kind):
    ends = {
        "cut": b'data: {"choices":[{"ind',
        "error": b'data: {"error": {"message": "the engine failed"}}\n\n',
        "nonsense": b"data: {nonsense\n\n",
    }
    words = {"cut": "connection ended", "error": "the engine failed", "nonsense": "{nonsense"}
    server.reply = lambda body: iter([event({"content": "The beginning"}), ends[kind]])
    reader = read()
    reader.ask("hello")
    expect(reader.page.locator(".error")).to_contain_text(words[kind])
    reader.page.reload()
    expect(reader.page.locator(".body")).to_have_text("The beginning")
    expect(reader.page.locator(".error")).to_contain_text(words[kind])


def test_a_key_is_asked_for_and_kept_for_the_session(read, server):
    server.key = "open sesame"
    reader = read(may_fail=True)
    page = reader.page
    for key in ("wrong", "芝麻", "open sesame"):
        expect(page.get_by_role("dialog")).to_be_visible()
        page.fill("#key", key)
        page.keyboard.press("Enter")
        if key != "open sesame":
            expect(page.get_by_text("did not take this key")).to_be_visible()
    expect(page.locator("#model-name")).to_have_text("tiny")
    page.reload()
    reader.ask("hello")
    reader.wait_for_answer()
    assert not [key for key in page.evaluate("Object.keys(localStorage)") if "key" in key]
    server.key = "another"
    reader.ask("hello again")
    expect(page.get_by_role("dialog")).to_be_visible()


def test_full_storage_is_told_and_costs_nothing_but_the_reload(read, server):
    reader = read()
    page = reader.page
    reader.ask("first")
    reader.wait_for_answer()
    page.evaluate(
        """() => {
        for (let size = 1 << 22; size >= 1; size >>= 1)
            for (let n = 0; ; n++)
                try { localStorage.setItem(`fill${size}.${n}`, "x".repeat(size)); } catch { break; }
    }"""
    )
    reader.ask("second")
    reader.wait_for_answer()
    expect(page.locator("#banner")).to_contain_text("storage is full")
    page.evaluate(
        "for (const key of Object.keys(localStorage)) if (key.startsWith('fill')) localStorage.removeItem(key)"
    )
    reader.ask("third")
    reader.wait_for_answer()
    expect(page.locator("#banner")).to_be_hidden()
    page.reload()
    expect(page.locator(".question")).to_have_text(["first", "second", "third"])


def test_what_lies_in_the_storage_may_be_anything(read):
    reader = read()
    page = reader.page
    page.evaluate(
        """() => {
        localStorage.clear();
        const put = (name, text) => localStorage.setItem("minimind." + name, text);
        put("chats", JSON.stringify([{id: "a", title: "ours"}, null, {id: 7}, {id: "b", title: "x"}]));
        put("chat.a", JSON.stringify({messages: [{role: "user", content: "kept"}, null, {role: "x"}]}));
        put("chat.b", "{broken");
        put("current", JSON.stringify("b"));
        put("sampling", "[1");
        put("theme", "nothing");
    }"""
    )
    page.reload()
    expect(page.locator(".chat-link")).to_have_text(["ours", "x"])
    page.locator(".chat-link").first.click()
    expect(page.locator(".question")).to_have_text(["kept"])


@pytest.mark.parametrize("value", ["5", '"fr"', "[null]", '{"toString": 5}'])
def test_values_in_the_storage_may_be_any_json(read, server, value):
    reader = read()
    page = reader.page
    page.evaluate(
        """(value) => {
        const put = (name, text) => localStorage.setItem("minimind." + name, text);
        for (const name of ["language", "sampling", "theme", "model"]) put(name, value);
        put("current", value);
        const [title, system] = ["ours", JSON.parse(value)];
        const message = {role: "assistant", content: "text"};
        const names = ["reasoning", "thinkingMs", "toolCalls", "finish", "error", "stats"];
        const messages = names.map((name) => ({...message, [name]: system}));
        messages.push({...message, error: {kind: "zzz", values: system}, toolCalls: [system]});
        messages.push({...message, error: {kind: "constructor"}, stats: {tokens: 3, rate: null}});
        messages.push({...message, error: {kind: "failed", values: {detail: system}}});
        put("chats", JSON.stringify([{id: "a", title}]));
        put("chat.a", JSON.stringify({system, messages, answeredUntil: system}));
    }""",
        value,
    )
    page.reload()
    page.locator(".chat-link").click()
    expect(reader.answers).to_have_text(["text"] * 9)
    expect(page.locator(".error").first).to_have_text("zzz")
    reader.ask("and now?")
    expect(reader.answers.last).to_have_text("hello")


def test_a_key_without_a_session_storage(read, server):
    server.key = "open sesame"
    reader = read(may_fail=True)
    page = reader.page
    blocked = "{get() { throw new DOMException('blocked', 'SecurityError'); }}"
    page.add_init_script(f"Object.defineProperty(window, 'sessionStorage', {blocked})")
    page.reload()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.fill("#key", "open sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#model-name")).to_have_text("tiny")
    reader.ask("hello")
    expect(reader.answers).to_have_text("hello")


def slow_reply(server) -> threading.Event:
    """Replies begin, and end when the event is set."""
    go_on = threading.Event()

    def reply(body):
        yield event({"content": "begins "})
        go_on.wait(20)
        yield from said("ends")

    server.reply = reply
    return go_on


def test_a_reply_that_a_reload_cuts_is_stopped(read, server):
    go_on = slow_reply(server)
    reader = read()
    reader.ask("hello")
    expect(reader.answers).to_have_text("begins ")
    reader.page.reload()
    go_on.set()
    expect(reader.answers).to_have_text("begins ")
    expect(reader.page.locator(".stats")).to_contain_text("1 token")
    expect(reader.page.locator(".stats")).to_contain_text("stopped")
    assert reader.saved()["messages"][1]["finish"] == "stopped"


def test_a_tab_that_died_leaves_its_conversation_to_the_others(read, server):
    reader = read()
    page = reader.page
    page.clock.install()
    page.evaluate(
        """() => {
        const put = (name, value) => localStorage.setItem("minimind." + name, JSON.stringify(value));
        const asked = {role: "user", content: "hello"};
        const replies = ["cut", "beg"].map((content) => ({role: "assistant", content}));
        const messages = replies.flatMap((reply) => [asked, reply]);
        put("chats", [{id: "a", title: "ours"}]);
        put("chat.a", {system: "", messages, answeredUntil: Date.now() + 80_000});
        put("current", "a");
    }"""
    )
    page.reload()
    expect(page.locator("#elsewhere")).to_be_visible()
    expect(page.locator(".streaming")).to_have_text("beg")
    page.clock.fast_forward(90_000)
    expect(page.locator("#elsewhere")).to_be_hidden()
    expect(page.locator(".stats")).to_have_text(["stopped"] * 2)
    reader.ask("hello")
    expect(reader.answers).to_have_text(["cut", "beg", "hello"])
    assert len(server.bodies) == 1


# --------------------------------------------------------------------------------------------------
# How it is used
# --------------------------------------------------------------------------------------------------


def test_the_drawer_is_what_is_asked_for(read, server):
    server.models = [MODEL | {"thinking": True}, MODEL | {"id": "other"}]
    reader = read()
    page = reader.page
    reader.ask("plain")
    reader.wait_for_answer()
    assert server.bodies.pop() == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "plain"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.click("#open-settings")
    values = {"temperature": "0.35", "top_p": "0.9", "top_k": "40", "max_tokens": "64", "seed": "7"}
    for name, value in values.items():
        page.fill(f"#{name}", value)
    page.fill("#system", "You are a sailor.")
    page.select_option("#thinking", "off")
    page.fill("#temperature", "3")
    expect(page.get_by_text("A number from 0 to 2")).to_be_visible()
    page.keyboard.press("Escape")
    reader.ask("refused")  # it leads back to what is wrong
    expect(page.locator("#settings")).to_be_visible()
    page.fill("#temperature", "0.35")
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")
    reader.wait_for_answer()
    body = server.bodies.pop()
    assert {name: body[name] for name in values} == {name: float(v) for name, v in values.items()}
    assert body["messages"][0] == {"role": "system", "content": "You are a sailor."}
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    expect(page.locator("#system-note")).to_contain_text("You are a sailor.")
    page.select_option("#model", "other")  # which cannot think
    page.reload()
    reader.ask("again")
    reader.wait_for_answer()
    body = server.bodies.pop()
    assert body["model"] == "other" and body["top_k"] == 40 and "chat_template_kwargs" not in body
    page.click("#open-settings")
    expect(page.locator("#thinking")).to_be_hidden()
    page.click("#reset")
    page.keyboard.press("Escape")
    reader.ask("defaults")
    reader.wait_for_answer()
    assert "temperature" not in server.bodies.pop()


def test_keys(read, server):
    reader = read()
    page = reader.page
    page.keyboard.type("one")  # the box has the focus from the start
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    # Enter that picks a Chinese word
    composing = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    page.evaluate(f"document.querySelector('#question').dispatchEvent({composing})")
    assert not server.bodies
    page.keyboard.press("Enter")
    reader.wait_for_answer()
    assert server.bodies[0]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.press("Enter")  # nothing to send
    assert len(server.bodies) == 1
    page.reload()
    page.locator(".skip").focus()
    expect(page.get_by_text("To the message box")).to_be_in_viewport()
    for _ in range(40):  # everything can be reached, and shows that it has the focus
        page.keyboard.press("Tab")
        shown = page.evaluate(
            """() => {
            const node = document.activeElement;
            const box = node.closest("#composer, .skip") ?? node;
            return node === document.body || getComputedStyle(box).outlineStyle !== "none";
        }"""
        )
        assert shown, page.evaluate("document.activeElement.outerHTML")


def test_screen_readers_hear_the_answer_once(read, server):
    go_on = threading.Event()

    def reply(body):
        yield event({"content": "The answer "})
        go_on.wait(20)
        yield from said("is **42**.")

    server.reply = reply
    reader = read()
    page = reader.page
    reader.ask("what?")
    expect(page.locator(".body")).to_contain_text("The answer")
    expect(page.locator("#status")).to_have_text("Answering…")
    live = (
        "#messages[aria-live], #messages [aria-live], #messages [role=status], #messages [role=log]"
    )
    assert page.locator(live).count() == 0
    go_on.set()
    expect(page.locator("#status")).to_have_text("Answer: The answer is **42**.")
    for role in ("navigation", "banner", "main"):
        expect(page.get_by_role(role)).to_have_count(1)


def test_the_view_follows_unless_one_scrolls_up(read, server):
    steps = [threading.Event(), threading.Event()]

    def reply(body):
        yield event({"content": "line\n\n" * 100})
        steps[0].wait(20)
        yield event({"content": "line\n\n" * 100})
        steps[1].wait(20)
        yield from said("last")

    server.reply = reply
    reader = read()
    page = reader.page
    reader.ask("much")
    expect(page.locator(".body p")).to_have_count(100)
    assert page.evaluate("(n => n.scrollHeight - n.scrollTop - n.clientHeight)(scroller)") < 2
    page.locator("#scroller").hover()
    page.mouse.wheel(0, -700)
    expect(page.locator("#latest")).to_be_visible()
    top = page.evaluate("scroller.scrollTop")
    steps[0].set()
    expect(page.locator(".body p")).to_have_count(200)
    assert page.evaluate("scroller.scrollTop") <= top
    page.click("#latest")
    steps[1].set()
    expect(page.locator(".body")).to_contain_text("last")
    reader.wait_for_answer()
    expect(page.locator("#latest")).to_be_hidden()
    expect(page.locator(".stats")).to_be_in_viewport()


def test_two_conversations_stream_at_once(read, server):
    go_on = threading.Event()

    def reply(body):
        yield event({"content": "begins "})
        if body["messages"][0]["content"] == "first":
            go_on.wait(20)
        yield from said("ends")

    server.reply = reply
    reader = read()
    page = reader.page
    reader.ask("first")
    expect(page.locator(".body")).to_have_text("begins")
    page.click("#new-chat")
    reader.ask("second")
    reader.wait_for_answer()
    page.locator(".chat-link").last.click()
    expect(page.locator(".question")).to_have_text("first")
    expect(page.locator("#stop")).to_be_visible()
    go_on.set()
    reader.wait_for_answer()
    expect(page.locator(".body")).to_have_text("begins ends")


def test_tabs_see_each_others_conversations(read, server):
    reader = read()
    other = reader.another_tab()
    reader.ask("from one tab")
    reader.wait_for_answer()
    expect(other.locator(".chat-link")).to_have_text("from one tab")


def test_one_tab_at_a_time_has_a_conversation_answered(read, server):
    go_on = slow_reply(server)
    reader = read()
    page = reader.page
    reader.ask("first")
    expect(reader.answers).to_have_text("begins ")
    other = reader.another_tab()
    expect(other.locator("#elsewhere")).to_be_visible()
    other.fill("#question", "second")
    expect(other.locator("#send")).to_be_disabled()
    other.keyboard.press("Enter")
    go_on.set()
    expect(other.locator(".body")).to_have_text("begins ends")
    expect(other.locator("#elsewhere")).to_be_hidden()
    expect(other.locator(".question")).to_have_text("first")
    other.click("#send")
    for tab in (page, other):
        expect(tab.locator(".question")).to_have_text(["first", "second"])
        expect(tab.locator(".body")).to_have_text(["begins ends"] * 2)
        expect(tab.locator(".answer.streaming")).to_have_count(0)
    assert len(reader.saved()["messages"]) == 4
    assert len(server.bodies) == 2


def test_a_conversation_that_another_tab_deletes_stays_deleted(read, server):
    go_on = slow_reply(server)
    reader = read()
    page = reader.page
    reader.ask("first")
    expect(reader.answers).to_have_text("begins ")
    other = reader.another_tab()
    other.get_by_role("button", name="Delete").click()
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()
    go_on.set()
    page.reload()
    for tab in (page, other):
        expect(tab.locator(".chat-link")).to_have_count(0)
    assert not page.evaluate("Object.keys(localStorage).filter(name => name.includes('chat.'))")
    other.get_by_role("button", name="Undo").click()
    expect(other.locator(".stats")).to_contain_text("stopped")
    expect(page.locator(".chat-link")).to_have_text("first")


def test_what_is_being_edited_outlives_what_another_tab_does(read, server):
    reader = read()
    page = reader.page
    reader.ask("first")
    reader.wait_for_answer()
    other = reader.another_tab()
    other.locator(".question").hover()
    other.get_by_role("button", name="Edit the question").click()
    other.keyboard.type(" draft")
    reader.ask("second")
    reader.wait_for_answer()
    expect(other.locator(".body")).to_have_text(["hello"] * 2)
    expect(other.locator(".editor textarea")).to_have_value("first draft")
    expect(other.locator(".editor textarea")).to_be_focused()
    other.get_by_role("button", name="Rename").click()
    other.keyboard.type("new ti")
    page.click("#new-chat")
    reader.ask("third")
    reader.wait_for_answer()
    other.keyboard.type("tle")
    other.keyboard.press("Enter")
    for tab in (page, other):
        expect(tab.locator(".chat-link")).to_have_text(["third", "new title"])


def test_an_edited_first_question_is_the_title(read, server):
    reader = read()
    page = reader.page
    reader.ask("first")
    reader.wait_for_answer()
    for question, title in (("other", "other"), ("last", "named")):
        page.locator(".question").hover()
        page.get_by_role("button", name="Edit the question").click()
        page.locator(".editor textarea").fill(question)
        page.keyboard.press("Enter")
        expect(page.locator(".question")).to_have_text(question)
        reader.wait_for_answer()
        expect(page.locator("h1")).to_have_text(title)
        page.get_by_role("button", name="Rename").click()
        page.keyboard.type("named")
        page.keyboard.press("Enter")


def test_the_welcome_is_seen_from_its_beginning(read):
    page = read().page
    page.set_viewport_size({"width": 390, "height": 300})
    page.reload()
    expect(page.locator("#model-size")).to_be_visible()
    assert page.evaluate("scroller.scrollHeight > scroller.clientHeight && !scroller.scrollTop")


def test_code_and_answers_are_copied(read, server):
    text = "Look:\n\n```sh\necho '<b>'\n```\n"
    server.reply = lambda body: said(text)
    reader = read(permissions=["clipboard-read", "clipboard-write"])
    reader.ask("code")
    reader.wait_for_answer()
    pasted = "navigator.clipboard.readText()"
    reader.page.get_by_role("button", name="Copy the code").click()
    expect(reader.page.get_by_role("button", name="Copied")).to_be_visible()
    assert reader.page.evaluate(pasted) == "echo '<b>'"
    reader.page.get_by_role("button", name="Copy the answer").click()
    expect(reader.page.get_by_role("button", name="Copied")).to_have_count(2)
    assert reader.page.evaluate(pasted) == text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["wide", "narrow"])
def test_axe_finds_nothing_serious(read, server, scheme, width):
    server.models = [MODEL | {"thinking": True}, MODEL | {"id": "other"}]
    server.reply = lambda body: said(DOCUMENT, 100, reasoning="so *so*")
    reader = read(scheme=scheme, width=width)
    page = reader.page

    def check(state: str) -> None:
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        bad = [f for f in found if f["impact"] in ("serious", "critical")]
        assert not bad, (state, [(f["id"], [n["html"] for n in f["nodes"]]) for f in bad])

    page.emulate_media(reduced_motion="reduce", color_scheme=scheme)
    check("welcome")
    page.click("#open-settings")
    page.fill("#system", "You are kind.")
    page.fill("#temperature", "9")
    check("drawer")
    page.click("#reset")
    page.keyboard.press("Escape")
    reader.ask("everything")
    reader.wait_for_answer()
    page.locator("summary").click()
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    server.reply = lambda body: iter([event({"tool_calls": [call]})])
    reader.ask("a tool, and an error")
    expect(page.locator(".error")).to_be_visible()
    page.evaluate("scroller.scrollTop = 0")
    page.locator(".question button").last.click(force=True)
    check("conversation")
    if width < 700:
        page.click("#menu")
    page.locator(".chat-link").hover()
    page.locator("#chats button").last.click()
    expect(page.locator("#toast")).to_be_visible()
    check("list")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


# --------------------------------------------------------------------------------------------------
# What the files hold
# --------------------------------------------------------------------------------------------------

OURS = sorted(WEB.glob("*.js"))


def test_nothing_in_the_sources_takes_html_or_another_host():
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser"
    )
    for path in [*OURS, WEB / "index.html", WEB / "style.css"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(forbidden, text), path
        assert set(re.findall(r"https?://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"}, path


def test_every_text_is_there_in_both_languages():
    text = (WEB / "i18n.js").read_text(encoding="utf-8")
    english, chinese = re.findall(r"^  (?:en|zh): \{\n(.*?)^  \},", text, re.MULTILINE | re.DOTALL)
    words = [
        dict(re.findall(r"^    (\w+):\s+(\".*\"),$", part, re.MULTILINE))
        for part in (english, chinese)
    ]
    assert words[0].keys() == words[1].keys()
    for key, english_words in words[0].items():
        places = [sorted(re.findall(r"\{\w+\}", said)) for said in (english_words, words[1][key])]
        assert places[0] == places[1], key
    used = "".join(path.read_text(encoding="utf-8") for path in [*OURS, WEB / "index.html"])
    used = used.replace(text, "")
    unused = [key for key in words[0] if not re.search(rf"[\"']{key}[\"']|: \"{key}\"", used)]
    assert not unused


def test_vendored_files_are_those_that_were_published():
    for name, digest in re.findall(
        r"^\| (\S+\.js) .*\| ([0-9a-f]{64}) \|$",
        (WEB / "vendored/README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    ):
        assert hashlib.sha256((WEB / "vendored" / name).read_bytes()).hexdigest() == digest
    assert {path.suffix for path in (WEB / "vendored").iterdir()} == {".js", ".md", ".LICENSE"}

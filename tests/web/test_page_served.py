"""The page to chat on, in a real Chromium, on scripts/serve.py with tiny models."""

import json
import re
import urllib.request

import pytest
import torch
from running import free_port, kill_all

pytest.importorskip("starlette", reason="no starlette: pip install -r requirements-serve.txt")
pytest.importorskip("uvicorn", reason="no uvicorn: pip install -r requirements-serve.txt")
pytest.importorskip("httptools", reason="no httptools: pip install -r requirements-serve.txt")
pytest.importorskip("playwright", reason="no playwright: pip install -r requirements-dev.txt")

from pages import Answers, Reader, open_browser
from playwright.sync_api import expect
from serving import FACTS, SHAPE, THOUGHT, TOOLS, Server, save, train_by_heart

from model.lm import LMConfig, MiniMindLM

WHO = "who are you?"
ENV = {"MINIMIND_KERNELS": "off"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """One model that knows its answers, and one that never stops talking."""
    folder = tmp_path_factory.mktemp("models")
    heart = train_by_heart(folder)
    torch.manual_seed(0)
    config = LMConfig(**SHAPE | {"vocab_size": 6400, "max_seq_len": 16_384})
    return {"heart": heart, "babble": save(MiniMindLM(config), folder, "babble")}


def serve(weights: dict, port: int = 0) -> Server:
    models = [f"--model={name}={path}" for name, path in weights.items()]
    return Server(weights["heart"].parent, *models, env=ENV, port=port)


@pytest.fixture(scope="module")
def server(weights):
    running = serve(weights)
    yield running
    text = running.log
    running.close()
    assert "Traceback" not in text, text


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def answers(browser):
    with Answers(browser) as answers:
        yield answers


@pytest.fixture
def read(answers, server):
    """read(**options) -> a Reader of the page whose replies are greedy."""

    def open_page(url: str = server.url, **options) -> Reader:
        reader = answers.open(url + "/", **options)
        reader.set("#temperature", "0")
        return reader

    return open_page


def start_babble(reader: Reader) -> None:
    """Ask the model that does not stop; returns when it talks."""
    reader.page.select_option("#model", "babble")
    reader.set("#temperature", "1")
    reader.set("#seed", "1")
    reader.ask("talk")
    expect(reader.page.locator(".streaming .body")).not_to_be_empty()


def running_requests(server) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        text = answer.read().decode()
    return sum(float(n) for n in re.findall(r"^\w*running\S* (\S+)$", text, re.MULTILINE))


def test_chat(read):
    reader = read()
    page = reader.page
    for question, answer in FACTS.items():
        reader.ask(question)
        reader.wait_for_answer()
        expect(reader.answers.last).to_have_text(answer)
        rate = "" if len(answer) == 1 else "tokens/s"  # of a single token there is none
        expect(page.locator(".stats")).to_contain_text(rate)
        page.click("#new-chat")
    expect(page.locator(".chat-link")).to_have_text([*FACTS][::-1])


def test_thoughts_and_tools(read):
    question, thought, answer = THOUGHT
    reader = read()
    page = reader.page
    reader.set("#thinking", "on")
    reader.ask(question)
    reader.wait_for_answer()
    expect(reader.answers.last).to_have_text(answer)
    page.locator("summary").click()
    expect(page.locator(".thoughts-body")).to_have_text(thought)
    page.click("#new-chat")
    reader.set("#tools", json.dumps(TOOLS))
    reader.set("#thinking", "")
    reader.ask("time in Paris?")
    expect(page.locator(".tool-call pre")).to_have_text('{\n  "city": "Paris"\n}')
    page.get_by_label("Result of get_time").fill("12:00")
    page.get_by_role("button", name="Send the results").click()
    expect(reader.answers.last).to_have_text("It is noon.")


@pytest.mark.parametrize("by", ["key", "button"])
def test_stop(read, server, by):
    reader = read()
    page = reader.page
    start_babble(reader)
    if by == "key":
        page.keyboard.press("Escape")
    else:
        page.click("#stop")
    reader.wait_for_answer()
    expect(page.locator(".stats")).to_contain_text("stopped")
    kept = reader.saved()["messages"][1]
    assert kept["content"] and kept["finish"] == "stopped"
    expect(page.locator("#send")).to_be_visible()
    while running_requests(server):  # its slot is free
        pass
    page.reload()
    expect(page.locator(".stats")).to_contain_text("stopped")


def test_answer_again(read):
    reader = read()
    page = reader.page
    for question in ("hi", WHO):
        reader.ask(question)
        reader.wait_for_answer()
    expect(page.get_by_role("button", name="Answer again")).to_have_count(1)
    page.get_by_role("button", name="Answer again").click()
    reader.wait_for_answer()
    messages = reader.saved()["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert len(reader.requests_of("/v1/chat/completions")) == 3


def test_edit_a_question(read):
    reader = read()
    page = reader.page
    for question in ("hi", WHO):
        reader.ask(question)
        reader.wait_for_answer()
    first = page.locator(".question").first
    first.hover()
    first.get_by_role("button", name="Edit the question").click()
    page.keyboard.press("Escape")
    expect(page.locator(".question")).to_have_text(["hi", WHO])
    first.get_by_role("button", name="Edit the question").click()
    first.get_by_role("textbox").fill("2+3")
    page.keyboard.press("Enter")
    reader.wait_for_answer()
    expect(page.locator(".question")).to_have_text("2+3")
    expect(reader.answers).to_have_text(FACTS["2+3"])
    assert len(reader.saved()["messages"]) == 2


def test_language(read):
    reader = read(locale="zh-CN")
    page = reader.page
    expect(page.locator(".hello")).to_have_text("想了解些什么？")
    reader.ask("你是谁")
    reader.wait_for_answer()
    expect(reader.answers).to_have_text(FACTS["你是谁"])
    expect(page.locator(".stats")).to_contain_text("每秒")
    page.get_by_role("button", name="English").click()
    expect(page.locator(".stats")).to_contain_text("tokens/s")
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page.get_by_placeholder("Ask something")).to_be_visible()
    expect(page).to_have_title("Chat")
    page.reload()
    expect(page.get_by_role("button", name="Answer again")).to_be_visible()


def test_conversations_are_kept(read):
    reader = read()
    page = reader.page
    reader.ask("hi")
    reader.wait_for_answer()
    page.click("#new-chat")
    reader.ask(WHO)
    reader.wait_for_answer()
    page.reload()
    expect(page.locator(".chat-link")).to_have_text([WHO, "hi"])
    expect(reader.answers).to_have_text(FACTS[WHO])
    page.get_by_role("button", name="hi", exact=True).click()
    expect(reader.answers).to_have_text(FACTS["hi"])
    page.get_by_role("button", name="Rename").last.click()
    page.keyboard.type("greeting")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("greeting")
    page.get_by_role("button", name="Delete").last.click()
    expect(page.locator(".chat-link")).to_have_text([WHO])
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".chat-link")).to_have_text([WHO, "greeting"])
    page.get_by_role("button", name="Delete").last.click()
    page.reload()
    expect(page.locator(".chat-link")).to_have_text([WHO])


def test_a_phone(read):
    reader = read(width=360)
    page = reader.page
    expect(page.locator("#sidebar")).to_be_hidden()
    reader.ask("hi " * 200)
    reader.wait_for_answer()
    page.get_by_role("button", name="Conversations").click()
    expect(page.locator("#new-chat")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    page.click("#new-chat")
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator("#welcome")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#settings")).to_be_in_viewport(ratio=0.3)
    page.get_by_role("button", name="Close").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_colours(read):
    reader = read(scheme="dark")
    page = reader.page
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.get_by_role("button", name="Colours").click()
    light = page.evaluate(paper)
    assert light != dark
    page.reload()
    assert page.evaluate(paper) == light
    expect(page.get_by_role("button", name="Colours: light")).to_be_visible()


def test_a_conversation_that_no_longer_fits(read):
    reader = read(may_fail=True)
    reader.ask("word " * 600)
    expect(reader.page.locator(".error")).to_contain_text("no longer fits the model's context")


def test_the_server_dies_and_comes_back(weights, read):
    port = free_port()
    first = serve(weights, port)
    assert first.url.endswith(f":{port}")
    try:
        reader = read(first.url, may_fail=True)
        page = reader.page
        start_babble(reader)
        kill_all(first.process)
        expect(page.locator(".error")).to_contain_text("connection ended before the answer did")
        assert reader.saved()["messages"][1]["content"]
        page.select_option("#model", "heart")
        reader.set("#temperature", "0")
        page.click("#new-chat")
        reader.ask("hi")
        expect(page.locator(".error")).to_contain_text("does not answer")
        expect(page.locator("#banner")).to_contain_text("Trying again until it does")
    finally:
        first.close()
    second = serve(weights, port)
    try:
        expect(page.locator("#banner")).to_be_hidden()
        page.locator(".error").get_by_role("button", name="Try again").click()
        reader.wait_for_answer()
        expect(reader.answers).to_have_text(FACTS["hi"])
    finally:
        second.close()

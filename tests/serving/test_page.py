"""The page in a real browser: what a person sees, does and is told when something is wrong."""

import contextlib
import itertools
import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request

import pytest
from websockets.sync.client import connect

#: Seconds in which what is waited for must be there.
PATIENCE = 30
#: An hour of the page's waiting in 36 s.
HASTE = (
    "const later = setTimeout; globalThis.setTimeout = (act, ms, ...rest) => later(act, ms / 100, ...rest);"
)


class Browser:
    """A headless Chromium, driven over the DevTools protocol."""

    def __init__(self, socket):
        self.socket = socket
        self.ids = itertools.count(1)
        self.pages = {}

    @classmethod
    @contextlib.contextmanager
    def started(cls, command, folder):
        switches = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-extensions",
            "--no-default-browser-check",
            "--remote-debugging-port=0",
        ]
        process = subprocess.Popen(
            [command, *switches, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            told = list(until(process.stderr, "DevTools listening on"))
            if not told or "DevTools" not in told[-1]:
                raise RuntimeError(f"{command} does not start: {''.join(told)}")
            # What it says from here on is of no interest, but must not fill the pipe.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            with connect(told[-1].split()[-1], proxy=None, max_size=None) as socket:
                browser = cls(socket)
                yield browser
                browser.send("Browser.close")
            process.wait(10)
        finally:
            process.kill()
            process.wait()

    def send(self, method, session=None, **parameters):
        """A command's result; events that come before it go to their pages."""
        number = next(self.ids)
        message = {"id": number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while True:
            answer = json.loads(self.socket.recv(timeout=2 * PATIENCE))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            if answer.get("sessionId") in self.pages:
                self.pages[answer["sessionId"]].hear(answer["method"], answer["params"])


def until(lines, text):
    """Lines up to the one that has a text."""
    for line in lines:
        yield line
        if text in line:
            return


class Page:
    """A tab with its own storage; keeps what it asked for and what went wrong."""

    def __init__(self, browser):
        self.browser, self.requests, self.errors = browser, [], []
        self.context = browser.send("Target.createBrowserContext")["browserContextId"]
        target = browser.send("Target.createTarget", url="about:blank", browserContextId=self.context)
        attached = browser.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        browser.pages[self.session] = self
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.size(1280, 900)

    def send(self, method, **parameters):
        return self.browser.send(method, self.session, **parameters)

    def hear(self, event, what):
        if event == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(what["exceptionDetails"])
        elif event == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            self.errors.append(what["args"])
        elif event == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.errors.append(what["entry"])

    def size(self, width, height, phone=False):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def before(self, script):
        """Runs a script in each document before its own."""
        self.send("Page.addScriptToEvaluateOnNewDocument", source=script)

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def ask(self, expression):
        """The value of an expression; that of a promise when it is fulfilled."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, condition):
        """Until an expression is true; its value."""
        found = self.ask(
            f"""new Promise((done) => {{
                const end = performance.now() + {PATIENCE * 1000};
                const look = () => {{
                    const value = {condition};
                    if (value) done([value]);
                    else if (performance.now() > end) done(null);
                    else requestAnimationFrame(look);
                }};
                look();
            }})"""
        )
        assert found, f"waited for {condition}; the page says: {self.ask('document.body.innerText')}"
        return found[0]

    def wait_text(self, text, selector="body"):
        """Until a text can be seen."""
        self.wait(
            f"""[...document.querySelectorAll({selector!r})].some((node) => node.checkVisibility()
            && node.innerText.includes({json.dumps(text)}))"""
        )

    def text(self, selector="body"):
        """What can be seen of an element."""
        return self.ask(f"document.querySelector({selector!r}).innerText").replace("\xa0", " ")

    def write(self, text):
        self.send("Input.insertText", text=text)

    def key(self, name):
        code = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39}
        what = {"key": name, "code": name, "windowsVirtualKeyCode": code[name]}
        typed = {"text": "\r"} if name == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **what, **typed)
        self.send("Input.dispatchKeyEvent", type="keyUp", **what)

    def click(self, selector, kinds=("mouseMoved", "mousePressed", "mouseReleased")):
        x, y = self.ask(
            f"""(() => {{
                const node = document.querySelector({selector!r});
                node.scrollIntoView({{block: "center"}});
                const box = node.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        for kind in kinds:
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def close(self):
        self.browser.send("Target.disposeBrowserContext", browserContextId=self.context)
        del self.browser.pages[self.session]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    command = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if command is None:
        pytest.skip("there is no Chromium or Chrome on this machine")
    with Browser.started(command, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(browser):
    page = Page(browser)
    yield page
    page.close()


def answer(served, path, **parameters):
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{served}/v1/{path}?{query}", timeout=PATIENCE) as response:
        return json.load(response)


@pytest.fixture
def linked(served):
    """An entity that has neighbours, and their names."""
    for entity in (f"m_{i}" for i in range(1, 13)):
        if found := [one["entity"] for one in answer(served, f"neighbours/{entity}")["neighbours"]]:
            return entity, found
    raise AssertionError("no machine has neighbours")


READY = "document.querySelector('main').getAttribute('aria-busy') === 'false'"


def test_the_total_and_the_peaks_are_shown(served, page):
    page.open(served)
    page.wait("document.querySelectorAll('#limits > *').length")
    assert "expected peak of cpu is" in page.text("#cluster-verdict")
    assert "with 95 % certainty below" in page.text("#cluster-verdict")
    issued = answer(served, "cluster")["issued"][:16].replace("T", " ")
    assert f"Load forecast of {issued} UTC" in page.text("h1")
    for line in ("path.mean", "path.observed"):
        assert len(page.ask(f"document.querySelector('#total-chart .plot {line}').getAttribute('d')")) > 20
    assert page.ask("document.querySelectorAll('#total-chart .plot path.band').length") == 2

    peaks = answer(served, "peaks", metric="cpu", quantile=0.95, limit=10)["peaks"]
    rows = page.ask("[...document.querySelectorAll('#peaks tbody tr')].map((row) => row.innerText)")
    assert len(rows) == len(peaks)
    for row, peak in zip(rows, peaks, strict=True):
        assert row.split()[0] == peak["entity"]
        assert f"{peak['value'] * 100:.1f}" in row
    assert not {"NaN", "undefined", "null", "[object"} & set(page.text().split())


def test_the_limit_can_be_changed(served, page):
    highest = answer(served, "peaks", metric="cpu", quantile=0.95, limit=1)["peaks"][0]
    page.open(served)
    page.wait("document.querySelectorAll('#limits > *').length")
    for limit, words in ((100 * highest["value"] + 1, "No machine passes"), (0.1, "12 machines of 12")):
        page.ask("document.querySelector('#limit-value').select()")
        page.write(f"{limit:.2f}")
        page.wait_text(words, "#limits")
    assert highest["entity"] in page.text("#limits")


def test_another_metric(served, page):
    page.open(f"{served}/?metric=memory")
    page.wait_text("memory: ", "#total-chart figcaption")
    page.ask(
        """(() => { const choice = document.querySelector("#page-metric"); choice.value = "cpu";
        choice.dispatchEvent(new Event("change")) })()"""
    )
    page.wait_text("cpu: ", "#total-chart figcaption")
    assert page.ask("location.search") == "?metric=cpu"


def test_a_search_opens_an_entity_with_its_forecast_and_neighbours(served, page, linked):
    entity, neighbours = linked
    page.open(served)
    page.wait(READY)
    page.click("#page-search")
    page.write(entity)
    page.wait(f"[...document.querySelectorAll('#page-hits a')].some((a) => a.textContent === {entity!r})")
    page.key("Enter")
    page.wait(f"location.hash === '#{entity}' && document.querySelector('#page-entity h1')")
    page.wait(f"document.activeElement.innerText === {entity!r}")

    assert "expected peak of cpu is" in page.text("#entity-verdict")
    assert len(page.ask("document.querySelector('#entity-chart .plot path.mean').getAttribute('d')")) > 20
    shown = page.ask("[...document.querySelectorAll('#neighbours ul a')].map((a) => a.textContent)")
    assert sorted(shown) == sorted(neighbours)
    assert page.text("#accuracy")
    assert not page.ask("document.querySelector('#cluster-head').checkVisibility()")

    # A neighbour is one click away, in the drawing as in the list.
    page.click("#neighbours svg a rect")
    page.wait(f"document.activeElement.matches('h1') && document.activeElement.innerText !== {entity!r}")
    assert page.ask("document.activeElement.innerText") in neighbours


def test_search_by_keys(served, page):
    page.open(served)
    page.wait(READY)
    page.ask("document.querySelector('#page-search').focus()")
    page.write("m_1")
    page.wait("document.querySelectorAll('#page-hits a').length === 4")
    for pressed, text in (("ArrowDown", "m_1"), ("ArrowDown", "m_10"), ("ArrowUp", "m_1")):
        page.key(pressed)
        assert page.ask("document.activeElement.textContent") == text
    page.key("Escape")
    assert page.ask("document.activeElement.id") == "page-search"
    assert not page.ask("document.querySelector('#page-results').checkVisibility()")
    page.write("<b>x")
    page.wait_text("No name has “m_1<b>x” in it.", "#page-found")


def test_values_by_pointer_by_keys_and_as_a_table(served, page):
    forecast = answer(served, "forecasts/m_12")
    series = next(one for one in forecast["forecasts"][0]["series"] if one["metric"] == "cpu")
    page.open(f"{served}/?metric=cpu#m_12")
    page.wait_text("m_12", "h1")
    page.ask("document.querySelector('#entity-chart .plot').focus()")
    page.key("ArrowRight")
    told = page.text("#entity-chart .readout")
    assert f"{forecast['times'][0][11:16]} UTC: expected {series['mean'][0] * 100:.1f} %; 90 %:" in told
    assert told == page.ask("document.activeElement.ariaValueText").replace("\xa0", " ")
    page.key("ArrowLeft")
    assert "observed" in page.text("#entity-chart .readout")
    before = page.text("#entity-chart .readout")
    page.click("#entity-chart .plot", ["mouseMoved"])
    assert page.text("#entity-chart .readout") not in (before, told)

    page.click("#entity-chart summary")
    page.wait("document.querySelector('#entity-chart details').open")
    page.wait(
        f"document.querySelectorAll('#entity-chart tbody')[0]?.rows.length === {len(forecast['times'])}"
    )
    last = page.ask("document.querySelectorAll('#entity-chart tbody')[0].rows[0].innerText")
    assert f"{series['mean'][0] * 100:.1f}" in last


def test_an_unknown_entity_is_named_in_the_error(served, page):
    page.open(f"{served}/#{urllib.parse.quote('no/such <i>one</i>', safe='')}")
    page.wait("document.querySelector('#page-entity [role=alert]')")
    with pytest.raises(urllib.error.HTTPError) as refused:
        answer(served, f"forecasts/{urllib.parse.quote('no/such <i>one</i>', safe='')}")
    assert json.load(refused.value)["error"] in page.text("#page-entity [role=alert]")
    assert page.text("#page-entity h1") == "no/such <i>one</i>"
    page.click("#page-entity .back a")
    page.wait_text("Load forecast of", "h1")


def test_nothing_is_wrong_in_the_console_and_no_one_else_is_asked(served, page, linked):
    page.open(served)
    page.wait("document.querySelectorAll('#limits > *').length")
    page.ask(f"location.hash = {linked[0]!r}")
    page.wait(f"document.activeElement.innerText === {linked[0]!r}")
    page.ask("location.hash = ''")
    page.wait_text("Load forecast of", "h1")
    assert page.errors == []
    assert page.requests
    assert {urllib.parse.urlsplit(url).netloc for url in page.requests} == {
        urllib.parse.urlsplit(served).netloc
    }


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(served, page, linked, width):
    page.size(width, 740, phone=width < 500)
    for where in ("", f"#{linked[0]}", "#no-such-one"):
        page.open("about:blank#" + where)
        page.open(f"{served}/{where}")
        page.wait(READY)
        page.ask("document.querySelectorAll('details').forEach((one) => { one.open = true })")
        page.wait("document.querySelector('main > div:not([hidden])')")
        assert page.ask("document.documentElement.scrollWidth") <= width
        wide = page.ask(
            """[...document.querySelectorAll("body *")]
                .filter((node) => node.checkVisibility() && !node.closest(".scroll"))
                .filter((node) => node.getBoundingClientRect().right > innerWidth + 1)
                .map((node) => node.outerHTML.slice(0, 200))"""
        )
        assert wide == []


def test_a_token_is_asked_for_and_sent(served, page):
    page.before(
        """const real = fetch;
        globalThis.fetch = async (url, init) => init.headers.Authorization === "Bearer s3cret"
            ? real(url, init) : Response.json({error: "a token is needed"}, {status: 401});"""
    )
    page.open(served)
    page.wait_text("a token is needed", "#page-token")
    page.wait("document.activeElement.id === 'page-token-value'")
    page.write("wrong")
    page.key("Enter")
    page.wait_text("not accepted", "#page-token")
    page.write("s3cret")
    page.key("Enter")
    page.wait_text("Load forecast of", "h1")
    assert not page.ask("document.querySelector('#page-token').checkVisibility()")


def test_without_a_forecast_the_page_says_why_and_comes_back_by_itself(served, page):
    page.before(
        HASTE
        + """const real = fetch;
        globalThis.fetch = async (url, init) => globalThis.well
            ? real(url, init) : Response.json({error: "no forecast is published"}, {status: 503});"""
    )
    page.open(served)
    page.wait_text("no forecast is published", "#page-problem")
    page.ask("globalThis.well = true")
    page.wait_text("Load forecast of", "h1")
    page.wait("document.querySelector('#page-problem').innerText === ''")


def test_a_new_forecast_is_announced_and_what_is_open_stays(served, page):
    page.before(
        HASTE
        + """const real = fetch; globalThis.fetch = async (url, init) => {
            const answer = await real(url, init);
            if (!globalThis.newer) return answer;
            const said = await answer.json();
            return Response.json("issued" in said ? {...said, issued: "2031-01-02T03:00:00Z"} : said);
        };"""
    )
    page.open(served)
    page.wait("document.querySelectorAll('#limits > *').length")
    page.click("#total-chart summary")
    page.ask("document.querySelector('#peaks a').focus()")
    held = page.ask("document.activeElement.textContent")
    page.ask("globalThis.newer = true")
    page.wait_text("A new forecast, issued 2031-01-02 03:00 UTC, has replaced the one of", "#page-news")
    page.wait_text("Load forecast of 2031-01-02 03:00 UTC", "h1")
    assert page.ask("document.querySelector('#total-chart details').open")
    assert page.ask("document.activeElement.textContent") == held

"""A headless Chromium that runs a page with onnxruntime-web and sends its results back."""

import shutil
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

import pytest

from tests.reports.browser import FLAGS

#: Where `make test-integrations` installs the package of npm.
RUNTIME = Path(sys.prefix) / "node_modules" / "onnxruntime-web" / "dist"
#: A busy machine compiles 14 MB of WebAssembly in a few seconds.
SECONDS = 120
TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm"}

#: Runs /model.onnx on an image of ones and sends back each output, as float32.
PAGE = b"""<!doctype html><script type="module">
try {
  const ort = await import("/runtime/ort.wasm.min.mjs");
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = "/runtime/";
  const session = await ort.InferenceSession.create("/model.onnx");
  const shape = [2, 3, 16, 16];
  const image = new ort.Tensor("float32", new Float32Array(2 * 3 * 16 * 16).fill(1), shape);
  const outputs = await session.run({[session.inputNames[0]]: image});
  for (const name of session.outputNames)
    await fetch("/output/" + name, {method: "POST", body: outputs[name].data});
  await fetch("/done", {method: "POST", body: ""});
} catch (error) {
  await fetch("/error", {method: "POST", body: String(error)});
}
</script>"""


def find_browser():
    """The path of Chromium; skips the test where it, or onnxruntime-web, is missing."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    if not RUNTIME.is_dir():
        pytest.skip("onnxruntime-web is missing: run `make test-integrations` with npm installed")
    return browser


def run_in_browser(browser, model, folder):
    """Name to bytes of the outputs of a model in onnxruntime-web.

    Args:
        browser: the path of Chromium.
        model: the bytes of an ONNX file.
        folder: an empty folder for what the browser stores.
    """
    messages = Queue()
    with _server(model, messages) as address:
        command = [browser, *FLAGS, f"--user-data-dir={folder}", address]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **quiet) as process:
            try:
                return dict(_outputs(messages))
            finally:
                process.terminate()


def _outputs(messages):
    while True:
        try:
            path, body = messages.get(timeout=SECONDS)
        except Empty:
            pytest.fail(f"The page has sent nothing for {SECONDS} s")
        if path == "/error":
            pytest.fail(body.decode())
        if path == "/done":
            return
        yield path.removeprefix("/output/"), body


@contextmanager
def _server(model, messages):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._answer(*self._find())

        def do_POST(self):
            messages.put((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer(200, b"", "text/plain")

        def _find(self):
            if self.path == "/":
                return 200, PAGE, "text/html"
            if self.path == "/model.onnx":
                return 200, model, "application/octet-stream"
            file = RUNTIME / self.path.rpartition("/")[2]
            if self.path.startswith("/runtime/") and file.is_file():
                return 200, file.read_bytes(), TYPES[file.suffix]
            return 404, b"", "text/plain"

        def _answer(self, status, body, kind):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()

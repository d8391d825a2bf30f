"""What the tests in this folder share, besides the helpers of test_smoke.py."""
import http.server, inspect, pathlib, re, sys, threading, time, urllib.request
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from test_smoke import (SCRIPTS, SMALL, TEXT, Screen, execute, fit, folder_with, interrupt,
                        losses, read, sample, without_seconds)
import torch
import torch.nn as nn

torch.set_num_threads(1)  # as in the processes started here, so that results can be compared
OVERFITS = 'to be or not ' * 400 + 'KING' * 150  # the more it learns, the less it expects KING
UNIQUE = ''.join(map(chr, range(1000, 2200)))  # no character twice
TEXTUAL = 'bigram.py', 'gpt.py', 'pretrain_finetune.py', 'modern_gpt.py'
UNTRAINED = '--max_iters=0 --pretrain_max_iters=0'

def run(script, more='', folder=None, **options):
    """The script in this process, for a few steps in float32 (see execute)."""
    settings = fit(script, f'{SMALL} --dtype=float32 {more}')
    return execute(script, settings, folder, **options)

# ---------------------------------------------- the one place that knows a script's inside
def call(names, function, **values):
    """Call a script's function. What is not in values comes from the script's globals; a value
    that is no parameter replaces the global of its name."""
    parameters = inspect.signature(names[function]).parameters
    names.update({name: value for name, value in values.items() if name not in parameters})
    arguments = {**names, **values}
    return names[function](**{name: arguments[name] for name in parameters if name in arguments})

def evaluate(names, model, tokens):
    """Mean loss of the model on the tokens."""
    return call(names, 'evaluate', model=model, val_data=tokens, tokens=tokens)

def get_batch(names, **values):
    """x and y of a training step."""
    return call(names, 'get_batch', **values)

def untrained(script, more='', folder=None):
    """The names in a script after a run without training, its model with random weights."""
    names = run(script, f'{more} {UNTRAINED}', folder).names
    torch.manual_seed(1)
    for p in names['model'].parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    names['model'].float().eval()
    return names

def load(run, name='*'):
    """The checkpoint that a run has left, or that of this name."""
    return torch.load(next(run.folder.glob(f'{name}.pt')), weights_only=True)

def warmup(steps, max_iters=12):
    """Settings for a warm-up of so many steps."""
    return f'--warmup_iters={steps} --warmup_ratio={steps / max_iters}'

# ------------------------------------------------------------------------------------------
def plain(x):
    """A checkpoint without tensors, which == can compare."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list):
        return [plain(value) for value in x]
    return x.tolist() if isinstance(x, torch.Tensor) else x

def same_end(test, a, b, name='*'):
    """Two runs have left the same checkpoint, to the last bit, and written the same."""
    test.assertTrue(plain(load(a, name)) == plain(load(b, name)))
    test.assertEqual(sample(a.out), sample(b.out))

def kill():
    """An end without any further step, as that of a killed process."""
    sys.exit('killed')

class Server:
    """Files on loopback, as a context: what this process asks of the internet goes there."""

    def __init__(self, bodies, broken=(), seconds=0):
        self.asked = asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                time.sleep(seconds)
                body = bodies.get(self.path, b'')
                first, last = re.findall(r'\d+', self.headers['Range'] or f'0-{len(body)}')
                body = body[int(first):int(last) + 1]
                self.send_response(200 if self.path in bodies else 404)
                self.send_header('Content-Length', len(body))
                self.end_headers()
                # the connection can break before all of it is sent
                self.wfile.write(body[:len(body) * 2 // 3] if self.path in broken else body)

            def log_message(self, *_):
                pass

        def redirected(request, *args, **options):
            if isinstance(request, str):
                request = urllib.request.Request(request)
            request.full_url = re.sub('^https?://[^/]+', self.address, request.full_url)
            return urlopen(request, *args, **options)

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.address = f'http://127.0.0.1:{self.server.server_port}'
        urlopen = urllib.request.urlopen
        self.patch = mock.patch('urllib.request.urlopen', redirected)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.patch.start()
        return self

    def __exit__(self, *_):
        self.patch.stop()
        self.server.shutdown()
        self.server.server_close()

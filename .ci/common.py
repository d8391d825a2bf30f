"""What the tests in this folder share, besides the helpers of test_smoke.py."""
import contextlib, http.client, http.server, inspect, json, pathlib, re, sys, threading, time
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from test_smoke import (SCRIPTS, SMALL, TEXT, Screen, execute, fit, folder_with, interrupt,
                        losses, read, sample)
import torch
import torch.nn as nn

torch.set_num_threads(1)  # as in the processes started here, so that results can be compared
OVERFITS = 'to be or not ' * 400 + 'KING' * 150  # the more it learns, the less it expects KING
UNIQUE = ''.join(map(chr, range(1000, 2200)))  # no character twice
STAGES = 'pretrained', 'finetuned', 'scratch', 'lora'  # of pretrain_finetune.py
TEXTUAL = 'bigram.py', 'gpt.py', 'pretrain_finetune.py', 'modern_gpt.py'
UNTRAINED = '--max_iters=0 --pretrain_max_iters=0'
SHAKESPEARE = '/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'  # for serve, below

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
    return call(names, 'evaluate', model=model, tokens=tokens)

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

# ------------------------------------------------------------------------------------------
def end(run):
    """What a run has left, its sample and checkpoints, in a form that == compares exactly."""
    states = {path.name: load(run, path.stem) for path in sorted(run.folder.glob('*.pt'))}
    return sample(run.out), json.dumps(states, default=torch.Tensor.tolist)

@contextlib.contextmanager
def serve(bodies, broken=(), seconds=0):
    """Files on loopback: what this process asks of the internet goes there. Gives the server's
    address and the list of what it is asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        log_message = mock.Mock()

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

    def https_open(handler, request):
        return handler.do_open(lambda _, timeout: http.client.HTTPConnection(
            *server.server_address, timeout=timeout), request)

    with (http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server,
          mock.patch('urllib.request.HTTPSHandler.https_open', https_open)):
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield f'http://127.0.0.1:{server.server_port}', asked
        finally:
            server.shutdown()

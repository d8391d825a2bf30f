"""The smoke test: each script, used as people use it for a few steps, must learn and be right.

    python test_smoke.py                           everything: no network, no GPU
    python test_smoke.py EveryScript.test_learns   one test
"""
import ast, collections, contextlib, functools, http.server, io, json, math, os
import pathlib, re, shlex, signal, subprocess, sys, tempfile, threading, time, types
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

# 6,000 characters, some beyond ASCII, of which a dozen steps can learn a little
NOUNS = ('HAMLET', 'cat', 'moon'), ('FOOL', 'moon', 'king'), ('KING', 'fool', 'cat')
TEXT = ''.join(f'{who}:\nThe {a} sees the {b}, naïve “{a}” — {i % 7}.\n\n'
               for i in range(40) for who, a, b in NOUNS)
OVERFITS = 'to be or not ' * 400 + 'KING' * 150  # the more it learns, the less it expects KING
UNIQUE = ''.join(map(chr, range(1000, 2200)))  # no character twice
ROOT = tempfile.TemporaryDirectory()

# each script with settings for a few steps
SMALL = ('--device=cpu --batch_size=8 --block_size=16 --max_new_tokens=40 --max_iters=12 '
         '--eval_interval=4')
GPT = SMALL + (' --dtype=float32 --n_layer=2 --n_head=2 --n_embd=32 --warmup_iters=1 '
               '--learning_rate=0.01')
SCRIPTS = {
    'bigram.py': SMALL,
    'gpt.py': GPT + ' --dropout=0.1',
    'addition_gpt.py': '--device=cpu --n_digits=2 --test_digits=4 --max_iters=12 '
                       '--eval_interval=4 --batch_size=64 --warmup_iters=1 '
                       '--learning_rate=0.01',
    'pretrain_finetune.py': GPT + ' --pretrain_max_iters=12 --pretrain_learning_rate=0.01 '
                                  '--finetune_learning_rate=0.01 --corpus=input.txt',
    'modern_gpt.py': GPT + ' --dropout=0.1',
    'gpt2.py': f'{GPT} --vocab_size=300 --total_batch_size=128 --cache_dir={ROOT.name}/cache',
}
TEXTUAL = [script for script in SCRIPTS if script not in ('addition_gpt.py', 'gpt2.py')]
# what scales a command of the README down, behind the command's own settings
TINY = '--max_iters=2 --batch_size=2 --n_layer=1 --max_new_tokens=9 '
QUICK = {
    'bigram.py': '--max_iters=2',
    'gpt.py': TINY,
    'addition_gpt.py': '--max_iters=2 --batch_size=8 --n_digits=2 --test_digits=5',
    'pretrain_finetune.py': f'{TINY}--pretrain_max_iters=2 --corpus=input.txt',
    'modern_gpt.py': f'{TINY}--block_size=16',
    'gpt2.py': f'{TINY}--total_batch_size=32 --block_size=16 --vocab_size=300 '
               f'--cache_dir={ROOT.name}/cache',
}
LINE = '-' * 64 + '\n'  # printed before the sample
HERE = pathlib.Path(__file__).resolve().parent
os.environ['no_proxy'] = '*'
ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONIOENCODING='utf-8')
torch.set_num_threads(1)  # as in the processes started here, so that results can be compared

def read(name):
    return (HERE / name).read_text(encoding='utf-8')

def folder_with(text):
    """A new folder with the text (a string or bytes) as input.txt; None: an empty folder."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=ROOT.name))
    if text is not None:
        text = text if isinstance(text, bytes) else text.encode()
        (folder / 'input.txt').write_bytes(text)
    return folder

def losses(output):
    """[(step, train loss, val loss)] as printed."""
    line = r'^step +(\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4}), \d+\.\d s$'
    return [(int(step), float(train), float(val))
            for step, train, val in re.findall(line, output, re.M)]

def without_seconds(output):
    return re.sub(r'\d+\.\d s', '', output)

def known(script, settings):
    """Its settings for a few steps, and those of the others that it has."""
    names = re.findall(r'^(\w+) = ', read(script), re.M)
    more = [one for one in settings.split() if one[2:].split('=')[0] in names]
    return ' '.join([SCRIPTS[script], *more])

def load(path):
    return torch.load(path, weights_only=True)

def start(script, settings, folder):
    """The script as its own process, copied into the folder."""
    (folder / script).write_text(read(script), encoding='utf-8')
    command = [sys.executable, script, *settings.split()]
    return subprocess.Popen(command, cwd=folder, env=ENV, encoding='utf-8',
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def run(script, settings, folder=None):
    """A whole run of it, as from a shell: folder, out, err and exit code."""
    folder = folder or folder_with(TEXT)
    process = start(script, settings, folder)
    out, err = process.communicate(timeout=100)
    return types.SimpleNamespace(folder=folder, out=out, err=err, code=process.returncode)

def together(*calls):
    """The results of the calls, made two at a time (there are two cores)."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(*call) for call in calls]]

def execute(script, settings='', folder=None, edit=str, namespace=None, argv=None):
    """The script in this process, which is faster: folder, out, names (its globals) and message
    (of the error that ended it, or 'fine')."""
    folder = folder or folder_with(TEXT)
    names = {} if namespace is None else namespace
    names['__name__'] = '__main__'
    out = io.StringIO()
    message = 'fine'
    filename = '<cell>' if argv else str(HERE / script)  # what is pasted has no file
    before = os.getcwd(), signal.getsignal(signal.SIGINT)
    os.chdir(folder)
    try:
        with (contextlib.redirect_stdout(out),
              mock.patch('sys.argv', argv or [script, *shlex.split(settings)])):
            exec(compile(edit(read(script)), filename, 'exec'), names)
    except SystemExit as error:
        message = error.code
    except Exception as error:
        message = f'{type(error).__name__}: {error}'
    finally:
        os.chdir(before[0])
        signal.signal(signal.SIGINT, before[1])
    return types.SimpleNamespace(folder=folder, out=out.getvalue(), names=names,
                                 message=message)

def cell(script, settings, namespace):
    """The script as a notebook cell: constants edited, the kernel's argv, no __file__."""
    def edit(source):
        for setting in settings.split():
            name, value = setting[2:].split('=')
            if not re.fullmatch(r'[\d.]+|True|False', value):
                value = repr(value)
            source, count = re.subn(rf'^( *){name} = [^\n]*', rf'\1{name} = {value}', source,
                                    flags=re.M)
            assert count, f'{script} has no line "{name} = ..."'
        return source
    argv = ['/usr/lib/python3/site-packages/ipykernel_launcher.py', '-f', '/tmp/kernel.json']
    return execute(script, '', None, edit, namespace, argv)

class Server:
    """Files on loopback that answer Range requests, as a context: its address."""

    def __init__(self, bodies, broken=(), ranges=True, seconds=0):
        self.asked = asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers['Range']
                asked.append((self.path, wanted))
                time.sleep(seconds)
                body = bodies.get(self.path)
                part = body or b''
                if ranges and wanted:
                    first, last = wanted[6:].split('-')
                    part = part[int(first):int(last) + 1]
                self.send_response(404 if body is None else 200)
                self.send_header('Content-Length', len(part))
                self.end_headers()
                if self.path in broken:  # the connection breaks before all of it is sent
                    part = part[:len(part) * 2 // 3]
                self.wfile.write(part)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f'http://127.0.0.1:{self.server.server_port}'
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

class EveryScript(unittest.TestCase):
    def each(self, scripts=SCRIPTS):
        for script in scripts:
            with self.subTest(script):
                yield script, SCRIPTS[script]

    @staticmethod
    @functools.cache
    def from_shell():
        """{script: a run of it as its own process}"""
        return dict(zip(SCRIPTS, together(*((run, *item) for item in SCRIPTS.items()))))

    def test_learns(self):
        """Alone with a text: the loss starts near ln(vocabulary) and falls, twice the same."""
        for script, settings in self.each():
            once = self.from_shell()[script]
            often = execute(script, settings + ' --eval_interval=1')
            other = execute(script, settings + ' --seed=5')
            self.assertEqual((once.code, once.err), (0, ''))
            printed = losses(often.out)
            curve = printed[-12:]  # the last stage, which begins from random weights
            self.assertEqual([step for step, *_ in curve], [*range(1, 13)])
            guessing = math.log(often.names['vocab_size'])
            delta = 1.0 if script == 'addition_gpt.py' else 0.35  # it starts by repeating tokens
            self.assertAlmostEqual(curve[0][1], guessing, delta=delta)
            self.assertLess(curve[-1][2], curve[0][2] - 0.1)
            stars = re.findall(r'^ +(\d+) (\*+)$', often.out, re.M)[-12:]
            for (step, train, _), (at, row) in zip(curve, stars, strict=True):
                self.assertEqual(int(at), step)
                self.assertAlmostEqual(len(row), 60 * min(1, train / guessing), delta=1.01)
            # evaluating more often changes nothing; another seed does
            few = [line for line in printed if line[0] % 4 == 0]
            self.assertEqual(few, losses(once.out))
            self.assertNotEqual(losses(once.out), losses(other.out))
            if script in TEXTUAL:
                sample = often.out.split(LINE)[-1]
                self.assertEqual(len(sample), 41)
                self.assertLessEqual(set(sample), set(TEXT))

    def test_notebook(self):
        """Pasted one after another into one kernel, twice: the output is that of the shell."""
        namespace = {}
        for script, settings in [*self.each(), *self.each()]:
            pasted = without_seconds(cell(script, settings, namespace).out)
            self.assertEqual(pasted, without_seconds(self.from_shell()[script].out))

    def test_bad_settings(self):
        """A setting is set or refused, with a message that names it, before training."""
        rows = [  # scripts, settings, part of the message
            (SCRIPTS, '--max_itres=5', 'max_itres'), (SCRIPTS, '--max_iters=many', ''),
            (SCRIPTS, '--max_iters', ''), (SCRIPTS, '--max_iters=1.5', ''),
            (SCRIPTS, 'max_iters=3', 'no such setting'), (SCRIPTS, '--xxmax_iters=3', 'no such'),
            (SCRIPTS, '--max_iters 3', '--max_iters='),
            (TEXTUAL, '--prompt ROMEO', 'write --prompt=value'), (SCRIPTS, '--seed=' + '9' * 20, 'seed'),
            (SCRIPTS, '--help', '    python '), (SCRIPTS, '-h', '    python '),
            (TEXTUAL, '--prompt=a[', 'prompt'),
            (TEXTUAL, '--temperature=0', 'temperature'), (['bigram.py'], '--n_head=3', 'n_head')]
        rows += [([script], settings, message) for script, settings, message in (
            ('gpt.py', '--resume=yes', 'True or False'), ('gpt.py', '--rung=1', 'bigram.py'),
            ('gpt.py', '--rung=13', 'rung'), ('gpt.py', '--gpu=True', '--gpu'),
            ('gpt.py', '--resume --checkpoint=no.pt', 'no.pt'),
            ('gpt.py', '--n_head=3', 'n_head'),
            ('gpt.py', '--beta2=1', 'beta parameter at index 1'),
            ('gpt.py', '--checkpoint=out/gpt.pt', 'out/'), ('gpt.py', '--dropout=2', 'dropout'),
            ('gpt.py', '--dtype=float17', 'float17'), ('gpt.py', '--learning_rate=no', 'no'),
            ('addition_gpt.py', '--position=last', "'coupled' or 'learned'"),
            ('addition_gpt.py', '--reverse=False', 'position=learned'),
            ('addition_gpt.py', '--position=learned --problem=1+' + '2' * 43, 'block_size=131'),
            ('addition_gpt.py', '--position=learned --block_size=13', 'block_size=14'),
            ('pretrain_finetune.py', '--corpus=no.txt', 'no.txt'),
            ('pretrain_finetune.py', '--resume', 'pretrained_gpt.pt'),
            ('pretrain_finetune.py', '--finetune_max_iters=5', 'no such setting'),
            ('modern_gpt.py', '--n_kv_head=3', 'n_kv_head (3)'),
            ('modern_gpt.py', '--activation=tanh', 'relu2'),
            ('modern_gpt.py', '--n_embd=30', 'rotary'),
            ('gpt2.py', '--total_batch_size=200', 'multiple of 128'),
            ('gpt2.py', '--top_p=0', 'top_p'), ('gpt2.py', '--vocab_size=200', 'must be 257'),
            ('gpt2.py', '--temperature=0', 'temperature'), ('gpt2.py', '--n_head=3', 'n_head'),
            ('gpt2.py', '--init_from=GPT2', 'gpt2-xl'),
            ('gpt2.py', '--resume --checkpoint=no.pt', 'no.pt'),
            ('gpt2.py', '--hellaswag', 'write --hellaswag=value'))]
        rows += [(['addition_gpt.py'], f"'--problem={problem}'", 'problem: two numbers')
                 for problem in ('12', '1+2+3', '-1+2', '1 + 2', '1+２', '12+', '+12', '0x1+2')]
        for scripts, settings, message in rows:
            for script in scripts:
                with self.subTest(f'{script} {settings}'):
                    ended = execute(script, f'{SCRIPTS[script]} {settings}')
                    self.assertNotEqual(ended.message, 'fine')
                    self.assertIn(message, ended.message)
                    self.assertEqual(losses(ended.out), [])
                    self.assertEqual(list(ended.folder.glob('*.pt')), [])

    def test_texts(self):
        """Odd texts that are right, and those that end in a message."""
        rows = (('', 'needs 161'), ('to be', 'needs 161'),
                ('Caf\xe9'.encode('latin-1') * 99, 'utf-8'), (UNIQUE * 5, 'fine'),
                ('a' * 20000, 'fine'), ('\ufeff' + 'to be\r\n' * 400, 'fine'))
        for script, settings in self.each([*TEXTUAL, 'gpt2.py']):
            for text, message in rows:
                if script == 'gpt2.py':
                    settings = settings.replace('--vocab_size=300', '')  # few have as many
                    message = message.replace('needs 161', 'is too short')
                ended = execute(script, settings, folder_with(text))
                self.assertIn(message, ended.message)
            if script != 'gpt2.py':  # of the last text: no byte-order mark, no CR
                self.assertEqual(ended.names['chars'], sorted('to be\n'))

    def test_download(self):
        """Where input.txt is missing it is downloaded: whole or not at all."""
        good = TEXT.encode()
        with Server({'/good': good, '/short': good}, {'/short'}) as server:
            def fetch(script, address):
                url = r"'https://raw\S+/'\n.*'|'https://raw\S+/input.txt'"
                edit = lambda source: re.sub(url, repr(address), source)
                return execute(script, SCRIPTS[script], folder_with(None), edit)
            for script, _ in self.each([*TEXTUAL, 'gpt2.py']):
                for path, message in (('/short', '(?i)incomplete'), ('/missing', '404'),
                                      ('/good', 'fine')):
                    ended = fetch(script, server.address + path)
                    got = [file.read_bytes() for file in ended.folder.iterdir()
                           if file.suffix in ('.txt', '.tmp')]
                    self.assertEqual(got, [good] if message == 'fine' else [])
                    self.assertRegex(ended.message, message)
                    self.assertIn(server.address, ended.out)  # it says from where
        self.assertIn('URLError', fetch('gpt.py', 'http://127.0.0.1:1/refused').message)

    def test_bigram_finds_the_counts(self):
        """On input.txt training ends within 0.005 nats of what counting all pairs gives."""
        run = execute('bigram.py', '', folder_with(read('input.txt')))
        text = read('input.txt')
        vocab_size = len(set(text))
        n = int(0.9 * len(text))
        pairs = collections.Counter(zip(text[:n], text[1:n]))
        firsts = collections.Counter(text[:n - 1])
        val = text[n:n + (len(text) - n - 1) // 64 * 64 + 1]  # whole sequences of 64
        counted = -sum(math.log((pairs[pair] + 1) / (firsts[pair[0]] + vocab_size))
                       for pair in zip(val, val[1:])) / (len(val) - 1)
        self.assertIn(f'val loss {counted:.4f}\n' + LINE, run.out)
        last = losses(run.out)[-1][2]
        self.assertAlmostEqual(run.names['evaluate'](), last, delta=6e-5)  # it samples from this
        self.assertLess(abs(last - counted), 0.005)

def reference(names, model, idx):
    """Logits (B, T, vocab) of a script's model from its weights and settings, by the formulas."""
    w = dict(model.named_parameters(remove_duplicate=False))
    config = vars(model.config) if hasattr(model, 'config') else names
    if 'table.weight' in w:
        return w['table.weight'][idx]
    n_head = config['n_head']
    n_kv_head = names.get('n_kv_head', n_head)
    block = names['Block'].__name__
    B, T = idx.shape

    def linear(x, name):
        return x @ w[name + '.weight'].T + w.get(name + '.bias', 0)

    def norm(x, name=None):
        if name and name + '.weight' not in w:
            return x
        if names.get('rms_norm') and name:
            return x / x.square().mean(-1, keepdim=True).sqrt() * w[name + '.weight']
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[name + '.weight'] + w[name + '.bias'] if name else x

    def heads(x, count):
        x = x.view(B, T, count, -1)  # heads that share keys get copies of them
        return x.transpose(1, 2).repeat_interleave(n_head // count, dim=1)

    def rotate(x):
        half = x.shape[-1] // 2
        angle = torch.arange(T)[:, None] * 10000 ** -(torch.arange(half) / half)
        x = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
        return torch.cat((x.real, x.imag), dim=-1)

    def attention(x, i):
        head_size = x.shape[-1] // n_head
        sizes = n_head * head_size, n_kv_head * head_size, n_kv_head * head_size
        q, k, v = linear(x, f'h.{i}.attn.c_attn').split(sizes, dim=-1)
        q, k, v = heads(q, n_head), heads(k, n_kv_head), heads(v, n_kv_head)
        if names.get('qk_norm'):
            q, k = norm(q), norm(k)
        if names.get('rotary'):
            q, k = rotate(q), rotate(k)
        att = (q @ k.transpose(-2, -1) / math.sqrt(head_size)).exp().tril()
        if f'h.{i}.attn.bias' in w:  # addition_gpt.py: only the own column and the next
            L = idx[0].tolist().index(10)
            column = [L - t if t < L else L + 1 if t == L else abs(2 * L + 1 - t)
                      for t in range(T)]
            share = F.pad(w[f'h.{i}.attn.bias'].exp(), (0, 2))  # of columns 0, 1, 2, -1
            distance = torch.tensor(column) - torch.tensor(column)[:, None]
            att = att * share[:, distance.clamp(-1, 2)]
        y = att / att.sum(-1, keepdim=True) @ v
        if f'h.{i}.attn.gate.weight' in w:
            gate = 2 / (1 + torch.exp(-linear(x, f'h.{i}.attn.gate')))  # (B, T, n_head)
            y = y * gate.transpose(1, 2)[..., None]
        return linear(y.transpose(1, 2).reshape(B, T, -1), f'h.{i}.attn.c_proj')

    def mlp(x, i):
        x = linear(x, f'h.{i}.mlp.c_fc')
        kind = names.get('activation', 'tanh' if hasattr(model, 'config') else 'gelu')
        if kind == 'swiglu':
            gate, value = x.chunk(2, dim=-1)
            x = gate / (1 + torch.exp(-gate)) * value
        elif kind.startswith('relu'):
            x = x.clamp(min=0) ** (2 if kind == 'relu2' else 1)
        elif kind == 'quick_gelu':
            x = x / (1 + torch.exp(-1.702 * x))
        elif kind == 'tanh':
            x = x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
        else:
            x = x / 2 * (1 + torch.erf(x / 2**0.5))
        return linear(x, f'h.{i}.mlp.c_proj')

    x = token = w['wte.weight'][idx]
    if 'wpe.weight' in w:
        x = x + w['wpe.weight'][:T]
    for back, share in enumerate(w.get('smear', ()), 1):
        x = x + share * F.pad(token, (0, 0, back, 0))[:, :T]
    for i in range(config['n_layer']):
        if block == 'Block':
            x = x + attention(norm(x, f'h.{i}.ln_1'), i)
            x = x + mlp(norm(x, f'h.{i}.ln_2'), i)
        elif block == 'PostNorm':
            x = norm(x + attention(x, i), f'h.{i}.ln_1')
            x = norm(x + mlp(x, i), f'h.{i}.ln_2')
        elif block == 'Residual':
            x = x + attention(x, i)
            x = x + mlp(x, i)
        else:
            x = attention(x, i)
            x = mlp(x, i) if block == 'AttentionThenMLP' else x
    return linear(norm(x, 'ln_f'), 'lm_head')

def untrained(script, settings='', folder=None):
    """The names in a script after a run without training, its model with random weights."""
    settings = known(script, f'{settings} --max_iters=0 --pretrain_max_iters=0')
    names = execute(script, settings, folder).names
    torch.manual_seed(1)
    for p in names['model'].parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    names['model'].float().eval()  # gpt2.py samples with half the bytes
    return names

MODERN = '--n_head=4 --qk_norm=True --dropout=0'
MODELS = [  # script, settings
    *(('gpt.py', f'--rung={rung} --n_embd=32 --block_size=16') for rung in range(2, 13)),
    ('pretrain_finetune.py', ''), ('gpt2.py', '--n_head=4'),
    ('modern_gpt.py', MODERN),
    ('modern_gpt.py', f'{MODERN} --n_kv_head=1 --activation=relu2 --flash=True'),
    ('modern_gpt.py', f'{MODERN} --n_kv_head=4 --activation=gelu --tied --smear=0 --head_gate=False'),
    ('modern_gpt.py', f'{MODERN} --n_kv_head=2 --activation=quick_gelu --rms_norm=True '
                      '--qk_norm=False'),
    ('modern_gpt.py', f'{MODERN} --activation=relu --rotary=False'),
]

# to be trained, but not changed
STILL = ' '.join(f' --{name}learning_rate=0' for name in ('', 'finetune_', 'pretrain_', 'muon_'))

class Model(unittest.TestCase):
    def test_reference(self):
        """The logits of every model are those of its formulas; later tokens change no earlier
        ones; the loss is the cross-entropy."""
        for script, settings in MODELS:
            with self.subTest(f'{script} {settings}'):
                names = untrained(script, settings)
                model = names['model']
                vocab_size = model.wte.num_embeddings
                tied = model.lm_head.weight is model.wte.weight
                self.assertEqual(tied, names.get('tied', True))
                for T in 16, 5, 1:
                    idx = torch.randint(vocab_size, (2, T))
                    logits, loss = model(idx, idx)
                    expected = reference(names, model, idx)
                    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
                    chances = F.softmax(expected, dim=-1).gather(-1, idx[..., None])
                    self.assertAlmostEqual(loss.item(), -chances.log().mean().item(), places=3)
                idx = torch.randint(vocab_size, (2, 16))
                other = idx.clone()
                other[:, 9] = (other[:, 9] + 1) % vocab_size
                change = (model(idx)[0] - model(other)[0]).abs().amax(dim=(0, 2))
                self.assertLess(change[:9].max().item(), 1e-5)
                self.assertGreater(change[9:].min().item(), 1e-4)

    def test_start(self):
        """The first weights: normal, with a gain over the root of the inputs, or zero."""
        rows = (('gpt.py', '', 0.8, 0.3, 0.07), ('pretrain_finetune.py', '', 0.8, 0.3, 0.07),
                ('gpt.py', '--rung=5 --block_size=64', 1.4, 1.4, 0.07),
                ('gpt.py', '--rung=6 --block_size=64', 0.8, 0.3, 0.07),
                ('addition_gpt.py', '--position=learned', 0.8, 0.3, 0),
                ('addition_gpt.py', '', 0.8, 0.3, 0),
                ('modern_gpt.py', '', 0.8, 0.0, 0.07), ('gpt2.py', '', 0.8, 0.3, 0))
        for script, more, gain, c_proj_gain, embedding in rows:
            more += (' --block_size=64 --n_embd=96 --max_iters=0 --pretrain_max_iters=0 '
                     '--max_new_tokens=1')
            model = execute(script, known(script, more)).names['model']
            for name, p in model.named_parameters():
                if name.endswith('.attn.bias'):  # a head for each column
                    self.assertEqual(p.tolist(), [[3, 0], [0, 3]])
                    continue
                with self.subTest(f'{script} {more} {name}'):
                    std = (c_proj_gain if 'c_proj' in name else gain) * p.shape[-1] ** -0.5
                    if name in ('wte.weight', 'wpe.weight'):
                        std = embedding or std
                    if p.dim() < 2 or name == 'smear' or 'gate' in name:
                        std = 0
                    if script == 'modern_gpt.py' and name == 'lm_head.weight':
                        std = 0
                    mean = float(p.dim() == 1 and 'weight' in name)
                    self.assertAlmostEqual(p.std().item(), std, delta=0.1 * std)
                    self.assertAlmostEqual(p.mean().item(), mean, delta=std / 5 + 1e-4)

    def test_ladder(self):
        """Each rung has the README's parameters; what is typed overrides it."""
        rows = re.findall(r'^\| (\d+) \|.*?\| ([\d,]+) \| \d\.\d{4} \|', read('README.md'), re.M)
        folder = folder_with(TEXT + ''.join(map(chr, range(1000, 1065 - len({*TEXT})))))
        self.assertEqual([int(rung) for rung, _ in rows], [*range(1, 13)])
        for rung, count in rows[1:]:
            names = execute('gpt.py', f'--max_iters=0 --max_new_tokens=1 --rung={rung}',
                            folder).names
            model = names['model']
            parameters = sum(p.numel() for p in model.parameters())
            self.assertEqual(f'{parameters:,}', count)
            self.assertEqual(isinstance(model.ln_f, nn.LayerNorm), int(rung) > 8)
            self.assertEqual(names['n_head'], 1 if rung == '2' else 4)
            self.assertEqual(model.drop.p, 0.1 if rung == '10' else 0)
        names = execute('gpt.py', '--rung=9 --n_layer=1 --max_iters=0').names
        self.assertEqual((names['n_layer'], names['n_head']), (1, 4))

    def test_training(self):
        """The steps are those of the formulas: gradients, clipped; warm-up and decay of the
        rate; AdamW or Muon; weight decay for matrices only."""
        rows = [(script, '--muon=False', 1e-4) for script in SCRIPTS]
        if hasattr(torch.optim, 'Muon'):  # in torch 2.9 or later; it works in bfloat16
            rows.append(('modern_gpt.py', '--muon_learning_rate=0.03', 0.12))
        for script, more, tolerance in rows:
            more += (' --learning_rate=0.02 --finetune_learning_rate=0.02 --warmup_iters=5 '
                     '--beta2=0.9 --grad_clip=0.3 --weight_decay=3 --dropout=0 '
                     '--pretrain_max_iters=0')
            trained = execute(script, known(script, more)).names['model']
            names = execute(script, known(script, f'{more} {STILL}')).names
            before = [p.detach().clone() for p in names['model'].parameters()]
            self.train_again(names)
            for (name, p), q, r in zip(trained.named_parameters(),
                                       names['model'].parameters(), before):
                with self.subTest(f'{script} {more} {name}'):
                    if 'c_attn.bias' not in name:  # k's has no gradient but rounding
                        self.assertLess((p - q).norm() / (q - r).norm(), tolerance)

    def train_again(self, names):
        """Train the model in names, untrained as yet, by the formulas."""
        model = names['model']
        warmup, clip, beta2, eps = 5, 0.3, 0.9, 1e-8
        if 'Bigram' in names:
            warmup, clip, beta2, eps = 0, math.inf, 0.999, 1e-4
        if 'sequences' in names:
            names['source'] = names['sequences']()
        params = dict(model.named_parameters())
        m = {name: torch.zeros_like(p) for name, p in params.items()}
        v = {name: torch.zeros_like(p) for name, p in params.items()}
        inner = [p for name, p in params.items() if names.get('muon') and '.c_' in name]
        muon = torch.optim.Muon(inner, 0.03, 3, 0.9) if inner else None
        for step in range(1, 13):
            names['step'] = step
            torch.manual_seed(1337 * 10**6 + step)
            x, y = names['get_batch'](*([names['train_data']] if 'corpus' in names else []))
            logits = reference(names, model, x)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
            model.zero_grad()
            loss.backward()
            norm = sum(p.grad.square().sum() for p in params.values()).sqrt().item()
            rate = math.cos(math.pi / 2 * (step - 1) / 12) * min(1, step / (warmup + 1))
            for name, p in params.items():
                g = p.grad * min(1, clip / norm)
                p.grad = g
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = beta2 * v[name] + (1 - beta2) * g * g
                if not (muon and '.c_' in name):
                    decay = 3 if p.dim() == 2 and 'weight_decay' in names else 0
                    root = (v[name] / (1 - beta2**step)).sqrt() + eps
                    p.data -= 0.02 * rate * (m[name] / (1 - 0.9**step) / root + decay * p.data)
            if muon:
                muon.param_groups[0]['lr'] = 0.03 * rate
                muon.step()

    def test_evaluation(self):
        """The mean over the whole validation text, without dropout, whatever the batch."""
        for script in TEXTUAL:
            names = untrained(script, '--dropout=0.5', folder_with(TEXT * 3))
            model, val = names['model'].train(), names['val_data']
            random = torch.get_rng_state()
            loss = names['evaluate'](*([model, val] if 'corpus' in names else []))
            self.assertTrue(torch.equal(random, torch.get_rng_state()))
            self.assertTrue(model.training)
            if 'dropout' in names:
                self.assertFalse(torch.equal(model(val[None, :16])[0], model(val[None, :16])[0]))
            model.eval()
            count = (len(val) - 1) // 16
            self.assertGreater(count, 64)  # more than one part
            parts = [F.cross_entropy(model(val[None, i:i + 16])[0][0], val[i + 1:i + 17]).item()
                     for i in range(0, 16 * count, 16)]
            self.assertAlmostEqual(loss, sum(parts) / count, places=4)

    def test_batches(self):
        """Sequences of the training text and their next characters; every place can occur."""
        for script in TEXTUAL:
            names = untrained(script, '--batch_size=20000 --epochs=False',
                              folder_with(UNIQUE[:600]))
            x, y = names['get_batch'](*([names['train_data']] if 'corpus' in names else []))
            self.assertTrue(torch.equal(x[:, 1:], y[:, :-1]))
            rows = {names['decode'](row) for row in torch.cat((x, y[:, -1:]), dim=1).tolist()}
            self.assertEqual(rows, {UNIQUE[i:i + 17] for i in range(540 - 16)})

    def test_epochs(self):
        """In each epoch every sequence comes once, in an order and at an offset of its own."""
        names = untrained('modern_gpt.py', '--batch_size=11', folder_with(UNIQUE))
        orders = set()
        for epoch in range(3):
            rows = []
            for step in range(1, 7):  # 66 whole sequences of 16 in 1,080 characters
                names['step'] = 6 * epoch + step
                x, y = names['get_batch']()
                self.assertTrue(torch.equal(x[:, 1:], y[:, :-1]))
                rows += [UNIQUE.index(names['decode'](row)) for row in x.tolist()]
            self.assertEqual(sorted(rows), [*range(min(rows), min(rows) + 66 * 16, 16)])
            orders.add((min(rows), tuple(row - min(rows) for row in rows)))
        self.assertEqual(len({order for _, order in orders}), 3)
        self.assertGreater(len({offset for offset, _ in orders}), 1)

    def test_sampling(self):
        """Temperature, top_k and top_p do what they say."""
        for script in [*TEXTUAL, 'gpt2.py']:
            model = untrained(script)['model']
            idx = torch.tensor([[0, 1]]).repeat(5000, 1)
            rows = [(0.1, 0, 1.0), (1.0, 0, 1.0)]
            if script != 'bigram.py':
                rows += [(0.5, 3, 1.0), (1e-4, 0, 1.0), (1.0, 1, 1.0), (1.0, 999, 1.0)]
            if script == 'gpt2.py':
                rows += [(2.0, 0, 0.6), (1.0, 9, 0.5)]
            options = 3 if script == 'gpt2.py' else 1 if script == 'bigram.py' else 2
            for row in rows:
                temperature, top_k, top_p = row
                logits = model(idx[:1])[0][0, -1] / temperature
                chances, order = F.softmax(logits, dim=0).sort(descending=True)
                chances[top_k or len(chances):] = 0
                chances[chances.cumsum(0) - chances >= top_p * chances.sum()] = 0
                chances /= chances.sum()
                drawn = next(model.generate(idx, 1, *row[:options]))
                self.assertEqual(drawn.shape, (5000, 1))
                share = torch.bincount(drawn[:, 0], minlength=len(chances))[order] / 5000
                with self.subTest(f'{script} {row}'):
                    self.assertLess((share - chances).abs().max().item(), 0.03)
                    self.assertEqual(share[chances == 0].sum().item(), 0)

    def test_context(self):
        """A token follows from the last block_size ones. With a cache only new positions are
        computed; a full cache is filled anew from its last half."""
        rows = [('gpt.py', '', 3, 16), ('pretrain_finetune.py', '', 3, 16), ('gpt2.py', '', 5, 8),
                ('gpt2.py', '', 25, 8), ('modern_gpt.py', '--kv_cache=False', 3, 16)]
        rows += [('modern_gpt.py', f'--n_head=4 {more}', 3, 8) for more in (
            '--qk_norm=True', '--n_kv_head=4 --flash=True',
            '--n_kv_head=1 --rotary=False --smear=0')]
        for script, more, length, kept in rows:
            with self.subTest(f'{script} {more} {length}'):
                names = untrained(script, more + ' --dropout=0')
                model = names['model']
                idx = torch.randint(names['vocab_size'], (3, length))
                seen = []
                hooks = [model.h[0].register_forward_hook(
                             lambda *args: seen.append(args[1][0].shape[1])),
                         model.lm_head.register_forward_hook(
                             lambda *args: seen.append(args[2][:, -1]))]
                out = torch.cat([idx, *model.generate(idx, 40)], dim=1)
                for hook in hooks:
                    hook.remove()
                self.assertEqual(out.shape, (3, length + 40))
                first = max(0, length - 16)  # of what is read
                for i, t in enumerate(range(length, length + 40)):
                    new = t if i == 0 else 1
                    if t - first > 16:
                        first = t - kept
                        new = kept
                    if kept == 16 or i == 0:
                        new = t - first
                    self.assertEqual(seen[2 * i], new)
                    torch.testing.assert_close(seen[2 * i + 1], model(out[:, first:t])[0][:, -1])

    def test_dtypes(self):
        """bfloat16 and float16 (with loss scaling) learn nearly what float32 learns, and can be
        resumed as each other; a step whose gradient overflows is left out."""
        line = '    scaler.scale(loss).backward()\n'
        spoil = '    if step == 12:\n        model.wte.weight.grad[0, 0] = math.nan\n'
        edit = lambda source: source.replace(line, line + spoil)
        for script in 'gpt.py', 'modern_gpt.py':
            last = {}
            for dtype in 'float32', 'bfloat16', 'float16':
                trained = execute(script, f'{GPT} --dtype={dtype}')
                last[dtype] = trained.names['loss'].item()
                self.assertEqual(trained.names['scaler'].is_enabled(), dtype == 'float16')
                for steps, other in (14, 'float16'), (16, 'bfloat16'), (18, 'float32'):
                    again = f'{GPT} --dtype={other} --resume --max_iters={steps}'
                    resumed = execute(script, again, trained.folder)
                    self.assertEqual(resumed.message, 'fine')
                    self.assertEqual(losses(resumed.out)[-1][0], steps)
            self.assertEqual(len(set(last.values())), 3)
            self.assertLess(max(last.values()) - min(last.values()), 0.02)
            spoiled = execute(script, f'{GPT} --dtype=float16', None, edit)
            self.assertEqual(losses(spoiled.out)[-1][0], 12)
            for name, p in load(next(spoiled.folder.glob('*.pt')))['model'].items():
                self.assertTrue(p.isfinite().all(), name)

    def test_modern_is_gpt(self):
        """With every switch at gpt.py's choice: its losses, weights and text, to the last bit."""
        switches = ('--muon=False --epochs=False --activation=gelu --rotary=False --smear=0 '
                    '--head_gate=False --qk_norm=False --rms_norm=False --flash=False --tied '
                    '--kv_cache=False --mlp_width=4 --c_proj_gain=0.3')
        for more in ' --n_kv_head=2', ' --dtype=bfloat16 --n_head=4 --n_embd=48 --n_kv_head=4':
            settings = SCRIPTS['gpt.py'] + more
            classic = execute('gpt.py', re.sub('--n_kv_head=.', '', settings))
            modern = execute('modern_gpt.py', f'{settings} {switches}')
            self.assertEqual(without_seconds(classic.out), without_seconds(modern.out))
            weights = modern.names['model'].state_dict()
            for name, p in classic.names['model'].state_dict().items():
                self.assertTrue(torch.equal(p, weights[name]), name)

class Addition(unittest.TestCase):
    """What addition_gpt.py writes, learns from, and counts."""

    def addition(self, settings, *more):
        settings = f'{SCRIPTS["addition_gpt.py"]} {settings}'
        return execute('addition_gpt.py', settings, *more)

    def test_batch(self):
        """Rows are sums; the targets are their answers. Problems held out become 0+0."""
        for n, settings in (2, '--reverse=False --position=learned'), (5, ''):
            settings += f' --max_iters=0 --batch_size=9000 --n_digits={n} --problem=1+2'
            names = self.addition(settings).names
            zeros = 0
            for row, target in zip(*(z.tolist() for z in names['get_batch']())):
                a, b = map(int, names['decode'](row).split('=')[0].split('+'))
                answer = f'{a + b:0{n + 1}}'[::-1 if n == 5 else 1]
                text = names['encode'](f'{a:0{n}}+{b:0{n}}={answer}')
                self.assertEqual(row, text[:-1])
                self.assertEqual(target, [-1] * (2 * n + 1) + text[2 * n + 2:])
                self.assertNotEqual((a * a + b * b) % 101, 1)
                zeros += a + b == 0
            self.assertTrue(50 < zeros < 130, zeros)
            self.assertTrue(80 < len(names['held_out_problems'](n, 100)) < 120)
            for a, b in names['val_problems'].tolist():
                a, b = (int(''.join(map(str, number))) for number in (a, b))
                self.assertEqual((a * a + b * b) % 101, 1)

    def test_columns(self):
        """The logits are those of the formulas. With coupled positions a digit of the answer
        depends on two columns and the digit before it: no longer sum has another case."""
        for settings in '', '--layer_norm=False --n_head=4', '--n_layer=2', '--position=learned':
            names = untrained('addition_gpt.py', settings)
            model = names['model']
            norms = sum(isinstance(m, nn.LayerNorm) for m in model.modules())
            self.assertEqual(norms, 0 if 'norm' in settings else 1 + 2 * names['n_layer'])
            for L in 2, 5:
                row = names['write'](torch.randint(10, (4, 2, L)))
                for T in 3 * L + 3, 2 * L + 2, L + 1:
                    expected = reference(names, model, row[:, :T])
                    torch.testing.assert_close(model(row[:, :T])[0], expected, atol=6e-5, rtol=6e-5)
            if settings.startswith('--n_layer') or 'learned' in settings:
                continue
            row = names['write'](torch.randint(10, (1, 2, 9)))[0]
            others = row.repeat(30, 1)
            others.fill_diagonal_(0)
            others[range(30), range(30)] = (row + 1) % 10  # in row t the token t is another one
            change = (model(others)[0] - model(row[None])[0]).abs().amax(dim=2)
            column = [*range(9, 0, -1), 10, *range(9, 0, -1), *range(11)]
            for t in range(30):
                for u in range(t, 30):
                    near = column[t] - column[u] in (0, 1)
                    self.assertEqual(change[t, u].item() > 1e-6, near, (t, u))

    def test_proof(self):
        """Of a model that is always right it counts 0 wrong; with one answer spoiled, 1."""
        def oracle(write, idx, spoiled):
            L = idx[0].tolist().index(10)
            problems = torch.stack((idx[:, :L], idx[:, L + 1:2 * L + 1]), dim=1)
            rows = write(problems)[:, 1:idx.shape[1] + 1]
            wrong = torch.tensor([p == spoiled for p in problems.flatten(1).tolist()])
            rows[wrong, 3 * L + 1:] = 7  # the last token of the answer
            return F.one_hot(rows, 12).float(), None

        fence = "print('-' * 64)\n"
        after = f'{fence}model.forward = lambda idx: oracle(write, idx, spoiled)\n'
        edit = lambda source: source.replace(fence, after)
        for n, spoiled, wrong, lines in (
                (2, [99], 0, ['2 digits: 0 wrong of 10,000,', ' 20 digits: 0 wrong of 477, 0']),
                (2, [4, 3, 5, 8], 1, ['2 digits: 1 wrong of 10,000,', '43+58=701 (wrong: it is 101']),
                (1, [1, 0], 1, ['1 digits: 1 wrong of 100,', '\n  1 digits: 491 wrong of 981, 0'])):
            names = {'oracle': oracle, 'spoiled': spoiled}
            settings = f'--n_digits={n} --test_digits=20 --max_iters=0'
            ended = self.addition(settings, None, edit, names)
            for line in lines:
                self.assertIn(line, ended.out)
            self.assertEqual(ended.out.count('(wrong: it is '), wrong)
            self.assertEqual(ended.out.count('(correct)'), 2)
        problems = ended.names['carry_all_along'](ended.names['held_out_problems'](7, 500))
        self.assertGreater(len(problems), 400)
        for a, b in problems.tolist():
            columns = [i + j for i, j in zip(a, b)]
            self.assertEqual(columns[:-1], [9] * 6)
            self.assertTrue(min(a + b) >= 0 and max(a + b) <= 9 < columns[-1])

    def test_answers(self):
        """One pass counts what greedy decoding gets right; --problem says which are right."""
        for settings in '', '--reverse=False --position=learned':
            settings += ' --max_iters=150 --warmup_iters=20 --eval_interval=999'
            trained = self.addition(settings)
            names = trained.names
            problems = torch.randint(10, (999, 2, 2))
            rows = names['write'](problems)
            out = names['model'].generate(rows[:, :6], 3)
            right, loss = names['check'](problems)
            self.assertTrue(torch.equal(right, (out == rows).all(dim=1)))
            y = F.pad(rows[:, 6:], (5, 0), value=-1)
            torch.testing.assert_close(loss.mean(), names['model'](rows[:, :-1], y)[1])
            self.assertTrue(50 < right.sum() < 950, right.sum())
            for a, b in ('12', '34'), ('7', '5'), ('0', '000'), ('1234', '9'):
                again = f'--device=cpu --resume --max_iters=0 --problem={a}+{b}'
                out = execute('addition_gpt.py', again, trained.folder).out.split(LINE)[1]
                L = max(2, len(a), len(b))
                row = names['encode'](f'{a.zfill(L)}+{b.zfill(L)}=')
                answer = names['model'].generate(torch.tensor([row]), L + 1)[0, len(row):]
                a, b = int(a), int(b)
                said, verdict = re.fullmatch(rf'{a}\+{b}=(.+?) \((.*)\)\n', out).groups()
                order = 1 if 'reverse=False' in settings else -1
                self.assertEqual(said.zfill(L + 1), names['decode'](answer)[::order])
                right = 'correct' if said == str(a + b) else f'wrong: it is {a + b}'
                self.assertEqual(verdict, right)

class Pretraining(unittest.TestCase):
    """The corpus, the three stages and LoRA of pretrain_finetune.py."""
    NONE = '--max_iters=0 --pretrain_max_iters=0'  # no training, only the names

    def pretrain(self, more=NONE, folder=None, edit=str):
        settings = f'{SCRIPTS["pretrain_finetune.py"]} {more}'
        return execute('pretrain_finetune.py', settings, folder, edit)

    def with_corpus(self, text):
        folder = folder_with(text)
        (folder / 'corpus.txt').write_text(text[::-1], encoding='utf-8')
        return folder

    def table(self, out):
        """{stage: (loss on the corpus, loss on input.txt)} as printed."""
        rows = re.findall(r'^(pretrained|finetuned|scratch|lora) +(\S+) +(\S+)$', out, re.M)
        return {stage: losses for stage, *losses in rows}

    def test_characters(self):
        """The corpus comes in the characters of input.txt; what is like none is dropped."""
        rows = [  # input.txt, corpus, what becomes of it
            ('"to be" - or not \'tis o', '“to” be—nót\u00a0‘tis’\t’s☃∑',
             '"to" be-not \'tis\' \'s'),
            ('to be-or\n', 'ﬆ–10…\r\nTo be', 't-\no be'),
            ("it's\n", 'it is "so“', "it is 's'"), ('“—é"', '“—é”', '“—é"'),
            ('to be\n', 'to be\n' * 12, 'to be\n' * 12)]
        for text, corpus, plain in rows:
            folder = folder_with((text + ' \n') * 200)
            (folder / 'odd.txt').write_text((corpus + '\n') * 200, encoding='utf-8', newline='')
            ended = self.pretrain(f'{self.NONE} --corpus=odd.txt', folder)
            names = ended.names
            data = torch.cat((names['corpus_train'], names['corpus_val']))
            self.assertEqual(names['decode'](data.tolist()), (plain + '\n') * 200)
            self.assertIn(f'; {len(data):,} after conversion', ended.out)
            self.assertEqual(len(names['corpus_val']), len(data) // 10)
        for corpus, message in (('ДОМ, дом\n' * 999, 'most of its characters'),
                                ('to be\n' * 20, 'odd.txt needs 170 characters')):
            (folder / 'odd.txt').write_text(corpus, encoding='utf-8')
            ended = self.pretrain(f'{self.NONE} --corpus=odd.txt', folder)
            self.assertIn(message, ended.message)

    @mock.patch('tiktoken.get_encoding')
    def test_corpus(self, encoding):
        """A text or a shard of tokens is fetched once; a damaged one leaves nothing behind."""
        def fetch(corpus, folder=None):
            address = rf"fineweb = '{server.address}/good.bin'"
            edit = lambda source: re.sub(r"fineweb = \('.*\n.*'\)", address, source)
            return self.pretrain(f'{self.NONE} --megabytes=1 --corpus={corpus}', folder, edit)

        # a token is a byte
        encoding.return_value.decode = lambda tokens: bytes(tokens).decode(errors='replace')
        text = '\n\nThe king sees – naïve – cats.\n'.encode() * 40000
        tokens = np.frombuffer(b'<|endoftext|>' + text[2:], np.uint8).astype('<u2')
        header = np.array([20240520, 1, len(tokens)] + 253 * [0], '<i4')
        whole = header.tobytes() + tokens.tobytes()
        few = np.array([20240520, 1, 9000] + 253 * [0], '<i4').tobytes() + whole[1024:19024]
        damaged = (  # part of the message, path, what the server sends
            ('incomplete', '/cut.bin', whole[:90000]), ('incomplete', '/few.bin', few[:-2]),
            ('incomplete', '/long.bin', few + few), ('tokens', '/magic.bin', b'7' + whole[1:]),
            ('IncompleteRead', '/broken.bin', whole), ('IncompleteRead', '/broken.txt', text),
            ('buffer', '/empty.bin', b'12345'), ('404', '/none.txt', None))
        bodies = {path: body for _, path, body in damaged}
        bodies |= {'/good.bin': whole, '/good.txt': text, '/small.bin': few}
        for ranges in True, False:
            with Server(bodies, ['/broken.bin', '/broken.txt'], ranges) as server:
                for corpus, size in (('fineweb', 250_000 - 11), ('/good.txt', 10**6),
                                     ('/small.bin', 9000 - 11)):
                    corpus = corpus.replace('/', server.address + '/')
                    folder = folder_with(TEXT)
                    for _ in range(1 + (size < 9000)):  # the second time the file is there
                        names = fetch(corpus, folder).names
                    kept = next(folder.glob('*_1MB.txt')).read_bytes()
                    self.assertEqual(kept.decode().rstrip('\ufffd'),
                                     text[:size].decode(errors='ignore'))
                    self.assertEqual(names['corpus_text'], kept.decode())
                self.assertEqual(server.asked, [
                    ('/good.bin', 'bytes=0-501023'), ('/good.txt', 'bytes=0-999999'),
                    ('/small.bin', 'bytes=0-501023')])
                for message, path, _ in damaged if ranges else ():
                    failed = fetch(server.address + path)
                    self.assertIn(message, str(failed.message))
                    self.assertEqual(os.listdir(failed.folder), ['input.txt'])
        with Server({'/good.bin': b'<html>' * 99}) as server:  # a Wi-Fi login page, for example
            self.assertIn('could not get FineWeb (not a file of GPT-2', fetch('fineweb').out)
        offline = fetch('fineweb')  # nobody answers any more
        self.assertEqual(offline.message, 'fine')
        self.assertIn('could not get FineWeb (<urlopen error', offline.out)
        self.assertEqual(len(offline.names['corpus_text']), 10**6)
        self.assertEqual(list(offline.folder.glob('*.txt')), [offline.folder / 'input.txt'])

    def test_docstrings(self):
        """They are those of Python and PyTorch, without tests and other packages."""
        root = folder_with(None) / '[a]'
        root.mkdir()
        source = '"""A."""\nclass C:\n    r"""B.\n\n    b"""\n    def f(self):\n        """C."""\n'
        for path in 'os.py', 'a/a.py', 'site-packages/b.py', 'test/c.py', 'data.txt':
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_text(source)
        docstrings = self.pretrain().names['docstrings']
        with (mock.patch('sysconfig.get_path', return_value=str(root)),
              mock.patch.object(torch, '__path__', [str(root / 'a')])):
            self.assertEqual(docstrings(), '\n\n'.join(3 * ['A.', 'B.\n\nb', 'C.']))

    def test_stages(self):
        """From the pretrained weights, and from scratch as gpt.py does; the table says what the
        best weights of each stage do, and gpt.py can continue them."""
        folder = self.with_corpus(OVERFITS)
        first = self.pretrain('--corpus=corpus.txt --max_iters=20', folder)
        names, lines, table = first.names, losses(first.out), self.table(first.out)
        best = load(folder / 'finetuned_gpt.pt')['best']
        for name, p in names['model'].state_dict().items():  # which writes the sample
            self.assertTrue(torch.equal(p, best[name]), name)
        classic = execute('gpt.py', f'{GPT} --max_iters=20', folder_with(OVERFITS))
        self.assertEqual(losses(classic.out), lines[8:])
        for i, (stage, part) in enumerate(zip(table, (lines[:3], lines[3:8], lines[8:]))):
            best = min(loss for _, _, loss in part)
            self.assertEqual(table[stage][min(i, 1)], f'{best:.4f}')
            saved = load(folder / f'{stage}_gpt.pt')
            names['model'].load_state_dict(saved['best'])
            for text, loss in zip(('corpus_val', 'val_data'), table[stage]):
                self.assertEqual(f'{names["evaluate"](names["model"], names[text]):.4f}', loss)
            again = f'{GPT} --resume --checkpoint={stage}_gpt.pt --max_iters=22'
            again = execute('gpt.py', again, folder)
            self.assertEqual(again.message, 'fine')
            self.assertIn(f'best val loss {best:.4f}' if i else '', again.out)
        self.assertGreater(lines[7][2], min(loss for _, _, loss in lines[3:8]))
        still = self.pretrain('--corpus=corpus.txt --finetune_learning_rate=1e-12')
        self.assertEqual(*map(self.table(still.out).get, ('pretrained', 'finetuned')))

    def test_stale_stages(self):
        """With --resume a stage whose text, weights or settings have changed starts over, others
        are kept; without it all do. Nothing is lost, and no stage is taken for finished."""
        settings = '--corpus=corpus.txt --seed=3'
        folder = self.with_corpus(TEXT)
        self.pretrain('--corpus=corpus.txt --max_iters=9', folder)
        interrupt = 'scaler.update(); step == 5 and signal.raise_signal(signal.SIGINT)'
        edit = lambda source: source.replace('scaler.update()', interrupt)
        before = (folder / 'pretrained_gpt.pt').read_bytes()
        stopped = self.pretrain(settings, folder, edit)
        self.assertNotIn('finetuned:', stopped.out)
        self.assertEqual(len(stopped.out.split(LINE)[1]), 41)
        self.assertEqual((folder / 'pretrained_gpt.pt.old').read_bytes(), before)
        self.assertEqual(len(list(folder.glob('*.old'))), 3)
        rows = [  # settings, which stages train, which of them start over
            ('', 'pretrained finetuned scratch', ''), ('', '', ''),
            ('--lora_rank=2', 'lora', ''), ('--lora_rank=1', 'lora', 'lora'),
            ('--pretrain_max_iters=20', 'pretrained finetuned', 'finetuned'),
            ('--pretrain_max_iters=20', 'finetuned scratch', 'finetuned scratch'),
            ('--finetune_learning_rate=0.02', 'finetuned', 'finetuned')]
        for i, (more, trains, over) in enumerate(rows):
            if i == 5:  # another text in the same characters
                (folder / 'input.txt').write_text(TEXT[2000:] + TEXT, encoding='utf-8')
            files = {file: file.read_bytes() for file in folder.glob('*_gpt.pt')}
            again = self.pretrain(f'{settings} --resume {more}', folder)
            parts = dict(re.findall(r'\n(\w+): [\d,]+ of(.*?)(?=\n\n)', again.out, re.S))
            trained = [stage for stage in parts if losses(parts[stage])]
            self.assertEqual(trained, trains.split(), more)
            started = [stage for stage in parts if 'starting over' in parts[stage]]
            self.assertEqual(started, over.split(), more)
            for stage in started:
                before = files[folder / f'{stage}_gpt.pt']
                self.assertEqual((folder / f'{stage}_gpt.pt.old').read_bytes(), before)
            if i < 4:  # as trained without an interruption
                anew = self.pretrain(f'{settings} {more}', self.with_corpus(TEXT))
                self.assertEqual(self.table(again.out), self.table(anew.out), more)
        for more in '--seed=4', '--corpus=input.txt', '--pretrain_learning_rate=1':
            refused = self.pretrain(f'{settings} --resume {more}', folder)
            self.assertIn('to resume pretrained_gpt.pt repeat its', refused.message)
        refused = self.pretrain(f'{settings} --resume --n_layer=3', folder)
        self.assertIn("'n_layer': 2", refused.message)
        sizeless = re.sub('--(block_size|n_layer|n_head|n_embd)=[0-9]+', '',
                          f'{SCRIPTS["pretrain_finetune.py"]} {settings} --resume')
        self.assertEqual(execute('pretrain_finetune.py', sizeless, folder).message, 'fine')
        (folder / 'input.txt').write_text(OVERFITS)
        refused = self.pretrain(f'{settings} --resume', folder)
        self.assertIn('pretrained_gpt.pt belongs to another input.txt', refused.message)

    def test_lora(self):
        """At first it changes nothing; merged it computes the same; only A and B are learned."""
        more = '--lora_rank=2 --lora_learning_rate=0.02'
        run = self.pretrain(more, folder_with(OVERFITS))
        names = run.names
        self.assertRegex(run.out, r'\nlora: 2,048 of [\d,]+ parameters are trainable\n')
        before, after = (load(run.folder / f'{name}_gpt.pt')
                         for name in ('pretrained', 'lora'))
        model = names['GPT']().eval()
        model.load_state_dict(before['best'])
        idx = torch.arange(11)[None]
        logits = model(idx)[0]
        names['add_lora'](model, 2)
        self.assertTrue(torch.equal(model(idx)[0], logits))
        model.load_state_dict(after['model'])
        merged = names['merged'](after['model'])
        names['model'].load_state_dict(merged)
        names['model'].eval()
        torch.testing.assert_close(names['model'](idx)[0], model(idx)[0])
        self.assertFalse(torch.equal(model(idx)[0], logits))
        for name, t in before['best'].items():
            self.assertTrue(torch.equal(after['model'][name], t), name)
            change = (merged[name] - t).view(len(t), -1)
            rank = torch.linalg.matrix_rank(change, rtol=1e-3).item()
            self.assertEqual(rank, 2 if '.c_' in name else 0, name)

class Gpt2(unittest.TestCase):
    """The model, the weights, the vocabulary, the data and the scores of gpt2.py."""

    @classmethod
    def setUpClass(cls):
        """Import the script, which trains nothing then, and run it once."""
        imported = {'__name__': 'gpt2'}
        exec(read('gpt2.py'), imported)
        assert 'optimizer' not in imported
        cls.trained = cls.script('--export=out --top_k=1')
        cls.names = cls.trained.names

    @classmethod
    def script(cls, more='', folder=None, host=r'\g<0>'):
        edit = functools.partial(re.sub, r'https://(huggingface|raw)[\w.]+', host)
        settings = SCRIPTS['gpt2.py']
        if 'dataset' in more:  # tokens, with a vocabulary of their own
            settings = settings.replace('--vocab_size=300', '')
        return execute('gpt2.py', f'{settings} {more}', folder, edit)

    def gpt(self, *sizes):
        torch.manual_seed(1)
        model = self.names['GPT'](self.names['GPTConfig'](*sizes)).eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)  # biases and gains too
        return model

    def test_start(self):
        """The 124M shape has as many parameters as OpenAI's; attention has its dropout."""
        GPT, GPTConfig = self.names['GPT'], self.names['GPTConfig']
        with torch.device('meta'):
            count = sum(p.numel() for p in GPT(GPTConfig()).parameters())
        self.assertEqual(count, 124_439_808)
        attn = GPT(GPTConfig(16, 300, 1, 2, 32, dropout=0.5)).h[0].attn
        attn.resid_dropout.p = 0.0  # what is left is the dropout of the weights
        x = torch.randn(1, 16, 32)
        self.assertFalse(torch.equal(attn(x), attn(x)))
        self.assertTrue(torch.equal(attn.eval()(x), attn(x)))

    def test_int8(self):
        """A sample in bfloat16 is written with 8-bit weights, which change little."""
        linear = nn.Linear(64, 48)
        x = torch.randn(2, 5, 64)
        exact = linear(x)
        rounded = self.names['Int8Linear'](linear).bfloat16()
        error = rounded(x.bfloat16()) - exact
        self.assertLess(error.std().item(), 0.007 * exact.std().item())
        for more, kinds in (('', ['Int8Linear']), ('--int8=False', ['Linear'])):
            names = self.script(f'--init_from=out --dtype=bfloat16 --max_iters=0 {more}',
                                self.trained.folder).names
            layers = [m for m in names['model'].modules() if 'Linear' in type(m).__name__]
            self.assertEqual(len(layers), 9)
            self.assertEqual(sorted({type(m).__name__ for m in layers}), kinds)
        odd = self.script('--n_embd=20 --n_head=2 --dtype=bfloat16')  # the kernel takes 16 n
        self.assertEqual(odd.message, 'fine')
        self.assertEqual(len(odd.out.split(LINE)), 2)

    def test_files(self):
        """Weights in OpenAI's layout, both ways; wrong, damaged and short files are refused."""
        model = self.gpt(16, 101, 2, 4, 32)
        load, save = self.names['from_pretrained'], self.names['save_pretrained']
        folder = folder_with(None)
        save(model, folder)
        file = folder / 'model.safetensors'
        config = (folder / 'config.json').read_text()
        stored = model.state_dict() | {'h.0.attn.bias': torch.ones(1, 1, 16, 16)}
        for name, t in stored.items():
            stored[name] = t.t() if t.dim() == 2 and name.startswith('h.') else t
        del stored['lm_head.weight']
        for kind, dtype, prefix in (('F32', torch.float32, ''), ('F16', torch.float16, ''),
                                    ('BF16', torch.bfloat16, 'transformer.')):
            header = {'__metadata__': {'format': 'pt'}}
            data = b''
            for name, t in stored.items():
                begin = len(data)
                data += t.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
                header[prefix + name] = {'dtype': kind, 'shape': [*t.shape],
                                         'data_offsets': [begin, len(data)]}
            head = json.dumps(header).encode()
            whole = len(head).to_bytes(8, 'little') + head + data
            file.write_bytes(whole)
            loaded = load(str(folder))
            save(loaded, folder)
            for other in (loaded, load(str(folder))):
                self.assertEqual(other.config, model.config)
                self.assertIs(other.lm_head.weight, other.wte.weight)
                for p, q in zip(model.parameters(), other.parameters(), strict=True):
                    self.assertTrue(torch.equal(p.to(dtype).float(), q), kind)
            # a head of its own is another model; a copy of wte is none
            stored['lm_head.weight'] = stored['wte.weight']
        rows = (  # what is replaced in the weights, part of the message
            (b'1.ln_2.bias', b'1.attn.bias', 'Missing key.*h.1.ln_2.bias'),
            (b'0.attn.bias', b'0.attn.else', 'Unexpected key.*h.0.attn.else'),
            (b'[128, 32]', b'[32, 128]', 'size mismatch for h.0.mlp.c_proj.weight'),
            (b'BF16', b'BI16', 'BI16'), (whole, whole[:-300], 'instead of'),
            (whole, whole + b'abc', 'instead of'), (whole, whole[:99], 'not a safetensors'),
            (whole, b'hello, world', 'not a safetensors'),
            (whole, whole[:-1] + b'9', 'lm_head and wte differ'))
        for old, new, message in rows:
            file.write_bytes(whole.replace(old, new))
            with self.assertRaisesRegex(Exception, f'(?s){message}'):
                load(str(folder))
        file.write_bytes(whole)
        for old, new, message in (('"n_head"', '"heads"', 'n_head'),
                                  ('gelu_new', 'relu', 'activation_function'),
                                  ('"model_type"', '"scale_attn_weights": false, "model_type"',
                                   'scale_attn_weights')):
            (folder / 'config.json').write_text(config.replace(old, new))
            with self.assertRaisesRegex(Exception, message):
                load(str(folder))
        file.unlink()
        with self.assertRaisesRegex(AssertionError, 'model.safetensors; init_from: gpt2, '):
            load(str(folder))

    def test_vocabulary(self):
        """Each merge is of a most frequent pair, by a naive count; any text comes back from its
        tokens; <|endoftext|> in a text is text; a long word takes no time."""
        text = TEXT + 'zzzzz naïve – ½ ²3 don\'t  \n\n x_y ' * 9
        words = [word.encode().decode('latin-1')
                 for word in re.findall(self.names['pattern'], text)]
        self.assertEqual(''.join(words), text.encode().decode('latin-1'))
        merges = self.names['learn_bpe'](text, 300)
        self.assertEqual(len(merges), 44)
        for i, pair in enumerate(merges, 256):
            pairs = collections.Counter()
            for word in words:
                pairs.update(zip(word, word[1:]))
            self.assertEqual(pairs[chr(pair[0]), chr(pair[1])], max(pairs.values()))
            words = [word.replace(chr(pair[0]) + chr(pair[1]), chr(i)) for word in words]
        encoding = self.names['make_encoding'](merges)
        merged = [*map(ord, ''.join(words))]
        self.assertEqual(encoding.encode_ordinary(text)[:1500], merged[:1500])
        for s in (text, '', '日本語 🎉\x00\r\n\t  ', ''.join(map(chr, range(3000)))):
            self.assertEqual(encoding.decode(encoding.encode_ordinary(s)), s)
        self.assertEqual(self.names['learn_bpe']('abc', 300), [])
        start = time.time()
        dna = ''.join('ACGT'[i * i * 7919 // 1000 % 4] for i in range(100_000))
        self.script('--max_iters=1 --vocab_size=400', folder_with('<|endoftext|>' * 99 + dna))
        self.assertLess(time.time() - start, 10)
        marked = '\ufeff' + '<|endoftext|>\r\n' * 400  # as Python's text mode reads it
        marked = self.script('--max_iters=1 --vocab_size=260', folder_with(marked)).names
        eot = marked['encoding'].eot_token
        self.assertEqual(eot, marked['vocab_size'] - 1)
        self.assertNotIn(eot, marked['train_shards'][0])
        both = [*marked['train_shards'][0], *marked['val_data']]
        self.assertEqual(marked['encoding'].decode(both), '<|endoftext|>\n' * 400)

    def test_shards(self):
        """Shards of tokens are downloaded once, whole, checked, and read piece by piece."""
        page = '/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}.bin'
        bodies = {}
        for count, name in ((2000, 'val_000000'), (3000, 'train_000001'), (4000, 'train_000002')):
            whole = np.array([20240520, 1, count] + [0] * 253, '<i4').tobytes()
            whole += np.arange(count, dtype='<u2').tobytes()
            bodies[page.format(name)] = whole
        gpt2 = mock.Mock(n_vocab=50257, eot_token=50256, encode_ordinary=list,
                         decode_bytes=lambda tokens: b'x' * len(tokens),
                         decode_single_token_bytes=lambda _: b'x')
        folder = folder_with(None) / 'fineweb'
        settings = f'--n_embd=8 --max_iters=1 --cache_dir={folder.parent}'
        for broken in True, False, False:
            with Server(bodies, [page.format('train_000002')] * broken) as server, \
                    mock.patch('tiktoken.get_encoding', return_value=gpt2):
                run = self.script(f'--dataset=fineweb --n_shards=2 {settings}',
                                  host=server.address)
            self.assertEqual('incomplete' in run.message, broken, run.message)
            self.assertEqual(len(list(folder.iterdir())), 2 if broken else 3)
        self.assertEqual(server.asked, [])  # the third time all are there
        names = run.names
        with mock.patch('tiktoken.get_encoding', return_value=gpt2):
            again = self.script(f'--dataset={folder} {settings}')  # as a folder of one's own
            refused = self.script(f'--dataset={folder} {settings} --vocab_size=300')
            other = self.script(f'--dataset={folder} {settings} --init_from=out --n_embd=32',
                                self.trained.folder)
        self.assertIn('vocab_size must be 50257', refused.message)
        self.assertIn('GPT-2 tokens', other.message)
        for run in names, again.names:
            self.assertEqual([len(shard) for shard in run['train_shards']], [3000, 4000])
            self.assertEqual(len(run['val_data']), 2000)
        # an epoch takes each piece once; each has an offset and an order of its own
        names['train_shards'] = [np.arange(96), np.arange(1000, 1048)]
        pieces = names['sequences']()
        seen = []
        for _ in range(4):
            epoch = [next(pieces) for _ in range(5 + 2)]
            for piece in epoch:
                self.assertEqual(piece.tolist(), [*range(piece[0], piece[0] + 17)])
            starts = [piece[0] for piece in epoch]
            self.assertEqual(sorted(starts)[:5], [*range(min(starts), min(starts) + 80, 16)])
            self.assertEqual(sorted(starts)[5] + 16, sorted(starts)[6])
            seen.append(tuple(starts))
        self.assertEqual(len(set(seen)), 4)
        names['source'] = names['sequences']()
        x, y = names['get_batch']()
        self.assertEqual(x.shape, (8, 16))
        self.assertTrue(torch.equal(x + 1, y))
        big = folder / 'big.bin'  # over 2 GB, most of it a hole
        big.write_bytes(np.array([20240520, 1, 2**30] + [0] * 253, '<i4').tobytes())
        os.truncate(big, 1024 + 2 * 2**30)
        self.assertEqual(len(names['read_shard'](big)), 2**30)
        big.unlink()
        for bad in (b'', whole[:-2], whole + b'ab', b'.' + whole[1:]):
            (folder / 'train_000002.bin').write_bytes(bad)
            with mock.patch('tiktoken.get_encoding', return_value=gpt2):
                broken = self.script(f'--dataset={folder} {settings}')
            self.assertRegex(broken.message, 'train_000002.*whole|IndexError')

    def test_scores(self):
        """The last tenth of a text is scored exactly, without dropout, in bits per byte; on
        HellaSwag as a second scorer does. An export samples and scores the same."""
        names = self.names
        encoding = names['encoding']
        val = names['val_data']
        train = encoding.decode(names['train_shards'][0].tolist())
        self.assertEqual(train + encoding.decode(val.tolist()), TEXT)
        self.assertAlmostEqual(len(train) / len(TEXT), 0.9, 3)
        val[100] = encoding.eot_token  # which is no byte of the text
        model = self.gpt(16, 300, 2, 2, 32, 0.5)  # with dropout, which must not act
        total = 0.0
        for i in range(0, 144, 16):
            x = torch.from_numpy(val[i:i + 17])
            total += F.cross_entropy(model(x[None, :-1])[0][0], x[1:], reduction='sum').item()
        size = len(encoding.decode_bytes(val[1:100].tolist() + val[101:145].tolist()))
        with mock.patch.dict(names, model=model.train(), val_data=val[:151]):
            self.assertAlmostEqual(names['evaluate'](), total / 144, 4)
            bits = names['bits_per_byte'](total / 144)
        self.assertAlmostEqual(bits, total / math.log(2) / size, 5)
        printed = float(re.search('([0-9.]+) bits per byte', self.trained.out)[1])
        self.assertTrue(1 < printed < 8)

        rows = []
        right = np.zeros(2)
        best = load(next(self.trained.folder.glob('*.pt')))['best']
        model = names['GPT'](names['model'].config).eval()
        model.load_state_dict(best)
        for i in range(1, 41):
            row = {'ctx': TEXT[7 * i:8 * i]}
            row['endings'] = [TEXT[n * i:n * i + n] for n in (5, 7, 9, 11)]
            scores = []
            for ending in row['endings']:
                end = encoding.encode_ordinary(f' {ending}')
                x = torch.tensor((encoding.encode_ordinary(row['ctx']) + end)[-17:])
                loss = F.cross_entropy(model(x[None, :-1])[0][0], x[1:], reduction='none')
                loss = loss[-len(end):].sum().item()
                scores.append((loss, loss / len(end)))
            chosen = np.argmin(scores, axis=0).tolist()  # by sum and by mean
            row['label'] = chosen[i % 3 > 0]
            right += np.equal(chosen, row['label'])
            rows.append(json.dumps(row))
        self.assertNotEqual(*right)
        page = '/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
        folder = self.trained.folder
        with Server({page: '\n'.join(rows + rows[:1]).encode()}) as server:
            run = self.script(f'--init_from=out --max_iters=0 --cache_dir={folder} --top_k=1 '
                              '--hellaswag=40', folder, server.address)
        self.assertIn(f'{right[0] / 40:.4f} by sum, {right[1] / 40:.4f} by mean', run.out)
        self.assertEqual(run.out.split(LINE)[1], self.trained.out.split(LINE)[1])
        for rank in (0, 1):
            with mock.patch.dict(run.names, rank=rank, world_size=2, sum_over_ranks=float,
                                 fetch=lambda *_: None):
                right -= 40 * np.array(run.names['score_hellaswag']())
        np.testing.assert_allclose(right, 0, atol=1e-9)  # two processes share the rows

    def test_processes(self):
        """Micro-batches and processes change no step; one process downloads for all."""
        whole = self.script('--total_batch_size=256 --batch_size=16')
        self.assertEqual(torch.initial_seed(), 1337 * 10**6 + 12)  # of the last step
        parts = self.script('--total_batch_size=256 --batch_size=4')
        folder = folder_with(None)
        page = '/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
        with Server({page: TEXT.encode()}, seconds=1) as server:
            source = re.sub(r'https://raw[\w.]+', server.address, read('gpt2.py'))
            (folder / 'gpt2.py').write_text(source, encoding='utf-8')
            command = ('-m torch.distributed.run --standalone --nproc_per_node=2 gpt2.py '
                       f'{SCRIPTS["gpt2.py"]} --total_batch_size=256')
            two = subprocess.run([sys.executable, *command.split()], cwd=folder, env=ENV,
                                 capture_output=True, encoding='utf-8')
        self.assertEqual(two.returncode, 0, two.stderr)
        self.assertEqual(len(server.asked), 1)
        self.assertEqual((folder / 'input.txt').read_bytes(), TEXT.encode())
        self.assertEqual([two.stdout.count(s) for s in (LINE, 'best val loss')], [1, 1])
        saved = load(next(whole.folder.glob('*.pt')))
        for other in folder, parts.folder:
            other = load(next(other.glob('*.pt')))
            for name, p in saved['model'].items():
                if not name.endswith('c_attn.bias'):  # that of k has no gradient but rounding
                    torch.testing.assert_close(other['model'][name], p, atol=1e-4, rtol=1e-4)
            self.assertAlmostEqual(other['train_loss'], saved['train_loss'], 4)
            self.assertAlmostEqual(other['best_loss'], saved['best_loss'], 4)
        with mock.patch.dict(os.environ, WORLD_SIZE='2'):
            self.assertIn('not by torchrun', self.script().message)

    def test_settings(self):
        """Sizes and vocabulary are those of the weights; what is typed holds or is refused."""
        folder = self.trained.folder
        few = ('--device=cpu --dtype=float32 --batch_size=8 --max_iters=24 --dropout=0.1 '
               f'--total_batch_size=128 --cache_dir={folder}')
        for more in '--resume', '--init_from=out --block_size=16':
            names = execute('gpt2.py', f'{few} {more} --checkpoint=gpt2.pt', folder).names
            config = names['model'].config
            self.assertEqual((config.n_layer, config.n_embd, config.vocab_size), (2, 32, 300))
            self.assertEqual((names['block_size'], config.dropout), (16, 0.1))
            self.assertEqual(names['model'].drop.p, 0.1)
            for name, size in dict(n_layer=3, n_head=4, n_embd=64, vocab_size=400).items():
                refused = execute('gpt2.py', f'{few} {more} --{name}={size}', folder)
                self.assertIn(f'{name} must be', refused.message)
        for more, message in (('--resume --block_size=32', 'block_size must be 16'),
                              ('--init_from=out --block_size=32', 'block_size must be at most 16'),
                              ('--init_from=out --block_size=8 --checkpoint=c.pt', 'fine'),
                              ('--resume --checkpoint=c.pt', 'fine')):  # takes the 8
            ended = execute('gpt2.py', f'{few} {more} --batch_size=4', folder)
            self.assertIn(message, ended.message)
        self.assertEqual(ended.names['block_size'], 8)
        self.assertEqual(ended.names['model'].config.block_size, 16)
        # rows that only pad GPT-2's table are cut off; another number is refused
        gpt2 = mock.Mock(n_vocab=50257, eot_token=50256, encode_ordinary=lambda _: [1],
                         decode_single_token_bytes=lambda _: b'x')
        for size, message in (50304, 'fine'), (50257, 'fine'), (300, 'weights expect 300 tokens'):
            model = self.gpt(16, size, 1, 2, 4)
            self.names['save_pretrained'](model, folder / 'padded')
            with mock.patch('tiktoken.get_encoding', return_value=gpt2):
                run = execute('gpt2.py', f'{few} --init_from=padded --max_iters=0', folder)
            self.assertIn(message, run.message)
            if message == 'fine':
                head = run.names['model'].lm_head.weight
                torch.testing.assert_close(head.float(), model.wte.weight[:50257], atol=1e-2,
                                           rtol=1e-2)

def plain(x):
    """A checkpoint without tensors, which == can compare."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list):
        return [plain(value) for value in x]
    return x.tolist() if isinstance(x, torch.Tensor) else x

class Checkpoint(unittest.TestCase):
    """Stopped anywhere and resumed: the same to the last bit as never stopped."""

    def same_end(self, a, b, file):
        self.assertEqual(*(without_seconds(run.out).split(LINE)[1:] for run in (a, b)))
        self.assertTrue(plain(load(a.folder / file)) == plain(load(b.folder / file)), file)

    def test_resume(self):
        """Killed after a checkpoint, or ended by Ctrl-C between two, in any script and stage."""
        kill = 'sys.exit("killed")'
        interrupt = 'signal.raise_signal(signal.SIGINT)'
        rows = [  # script, more settings, text, stage, checkpoint
            ('gpt.py', '', TEXT, '', 'gpt.pt'),
            ('gpt.py', ' --max_iters=40', OVERFITS, '', 'gpt.pt'),
            ('modern_gpt.py', '', TEXT, '', 'modern_gpt.pt'),
            ('addition_gpt.py', '', TEXT, '', 'addition_gpt.pt'),
            ('gpt2.py', ' --dropout=0.1', TEXT, '', 'gpt2.pt'),
            ('pretrain_finetune.py', '', TEXT, 'pretrained', 'pretrained_gpt.pt'),
            ('pretrain_finetune.py', '', TEXT, 'finetuned', 'finetuned_gpt.pt'),
            ('pretrain_finetune.py', ' --lora_rank=2', TEXT, 'lora', 'lora_gpt.pt')]
        for script, more, text, stage, file in rows:
            settings = SCRIPTS[script] + more
            whole = execute(script, settings, folder_with(text))
            update = 'optimizer.step()' if script == 'addition_gpt.py' else 'scaler.update()'
            for line, stop, at in (('save()', kill, 8), (update, interrupt, 5),
                                   ('save()', kill, 36)):
                if at > whole.names.get('step', 12):
                    continue
                with self.subTest(f'{script}{more} {stage} {stop} at {at}'):
                    def edit(source):
                        here = f"(locals().get('stage', ''), step) == ('{stage}', {at})"
                        return re.sub(rf'^( +|.*: ){re.escape(line)}$',
                                      lambda found: f'{found[0]}; {here} and {stop}',
                                      source, flags=re.M)
                    stopped = execute(script, settings, folder_with(text), edit)
                    self.assertEqual(stopped.message, 'killed' if stop == kill else 'fine')
                    after = execute(script, f'{settings} --resume=True', stopped.folder)
                    self.assertRegex(after.out, f'after step {at}\\b')
                    self.same_end(after, whole, file)
            if stage in ('', 'lora'):
                self.only_samples(script, f'{settings} --resume=True', whole.folder)

    def only_samples(self, script, settings, folder):
        before = {path: path.read_bytes() for path in folder.glob('*.pt*')}
        setting = 'problem' if script == 'addition_gpt.py' else 'prompt'
        for prompt in ('12+9', '0+0') if setting == 'problem' else ('to', 'e'):
            only = execute(script, f'{settings} --max_iters=0 --{setting}={prompt}', folder)
            self.assertEqual((only.message, losses(only.out)), ('fine', []))
            self.assertTrue(only.out.split(LINE)[-1].startswith(prompt))
        self.assertEqual({path: path.read_bytes() for path in folder.glob('*.pt*')}, before)

    @unittest.skipUnless(hasattr(signal, 'SIGKILL'), 'needs the signals of Linux or macOS')
    def test_signals(self):
        """A process that is killed, gets Ctrl-C, or loses its reader (| head) has saved."""
        settings = SCRIPTS['gpt.py'] + ' --max_iters=120 --eval_interval=10'

        def stopped(how):
            folder = folder_with(TEXT)
            process = start('gpt.py', settings, folder)
            while not (folder / 'gpt.pt').exists() and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(how)
            out, err = process.communicate(timeout=100)
            return folder, out, err, process.returncode

        def reader_leaves():
            folder = folder_with(TEXT)
            rare = SCRIPTS['gpt.py'] + ' --max_iters=4000 --eval_interval=4000'
            with start('gpt.py', rare, folder) as process:
                process.stdout.readline()
                process.stdout.close()
                process.stderr.read()
            return folder

        whole = execute('gpt.py', settings)
        *ends, left = together((stopped, signal.SIGKILL), (stopped, signal.SIGINT),
                               (reader_leaves,))
        self.assertTrue(0 < load(next(left.glob('*.pt')))['step'] < 4000)
        self.assertEqual(ends[0][3], -signal.SIGKILL)
        self.assertEqual((ends[1][2], ends[1][3]), ('', 0))
        self.assertEqual(len(ends[1][1].split(LINE)[1]), 41)  # Ctrl-C: a sample
        again = settings + ' --resume'
        for folder, *_ in ends:
            after = execute('gpt.py', again, folder)
            step = int(re.search(r'after step (\d+)', after.out)[1])
            self.assertTrue(0 < step < 120, step)
            self.same_end(after, whole, 'gpt.pt')
            self.assertEqual(list(after.folder.glob('*.tmp')), [])

    def test_best_weights(self):
        """Where the loss rises again the best weights are kept, and used to sample; --resume
        takes the optimizer's settings from the command line."""
        for script in 'gpt.py', 'modern_gpt.py', 'gpt2.py':
            settings = SCRIPTS[script].replace('300', '257') + ' --dropout=0 --top_k=0'
            trained = execute(script, settings + ' --max_iters=40', folder_with(OVERFITS))
            saved = load(next(trained.folder.glob('*.pt')))
            printed = losses(trained.out)
            best = min(loss for _, _, loss in printed)
            self.assertLess(best, printed[-1][2])
            perplexity = re.search(f'best val loss {best:.4f}, perplexity (.+)', trained.out)[1]
            self.assertAlmostEqual(math.log(float(perplexity)), best, 3)
            model = trained.names['model']
            for name, p in model.state_dict().items():
                self.assertTrue(torch.equal(p, saved['best'][name]), name)
            model.load_state_dict(saved['model'])
            self.assertAlmostEqual(trained.names['evaluate'](), printed[-1][2], places=4)
            again = settings + ' --resume --max_iters=42 --weight_decay=0.3 --beta2=0.9'
            names = execute(script, again, trained.folder).names
            for optimizer in names.get('optimizers') or [names['optimizer']]:
                for group in optimizer.param_groups:
                    decay = 0.3 if group['params'][0].dim() == 2 else 0.0
                    self.assertEqual(group['weight_decay'], decay)
                    self.assertEqual(group.get('betas', (0.9, 0.9)), (0.9, 0.9))

    def test_settings(self):
        """Sizes are the checkpoint's; what doesn't fit it is refused, and it stays whole."""
        folder = execute('gpt.py', GPT).folder
        sizeless = '--device=cpu --dtype=float32 --batch_size=8 --eval_interval=4 '
        resumed = execute('gpt.py', sizeless + '--resume --max_iters=14', folder)
        names = resumed.names
        self.assertEqual(resumed.message, 'fine')
        self.assertEqual([names['n_layer'], names['n_embd'], names['block_size']], [2, 32, 16])
        good = (folder / 'gpt.pt').read_bytes()
        modern = execute('modern_gpt.py', GPT).folder / 'modern_gpt.pt'
        rows = (  # settings, contents of gpt.pt, text, part of the message
            ('--n_layer=3', good, TEXT, "'n_layer': 2"), ('--n_head=4', good, TEXT, 'n_head'),
            ('--rung=9 --checkpoint=gpt.pt', good, TEXT, '--rung=12'),
            ('', good[:9999], TEXT, 'Error'),
            ('', b'', TEXT, 'Error'), ('', good, 'to be ' * 99, 'other characters'),
            ('', good, None, 'the input.txt that gpt.pt was trained on'),
            ('', modern.read_bytes(), TEXT, 'KeyError'))
        for setting, contents, text, message in rows:
            with self.subTest(message):
                other = folder_with(text)
                (other / 'gpt.pt').write_bytes(contents)
                ended = execute('gpt.py', f'{sizeless} --resume {setting}', other)
                self.assertIn(message, ended.message)
                self.assertEqual((other / 'gpt.pt').read_bytes(), contents)
        # a new run without --resume leaves the old one beside it
        execute('gpt.py', GPT, folder)
        self.assertEqual((folder / 'gpt.pt.old').read_bytes(), good)

    def test_trouble(self):
        """A full disk, a loss that is not finite: what was saved stays whole."""
        folder = execute('gpt.py', GPT).folder
        before = (folder / 'gpt.pt').read_bytes()

        for line in 'torch.save(state, file)', 'os.replace(temporary, checkpoint)':
            def edit(source):
                self.assertEqual(source.count(line), 1)
                return source.replace(line, "raise OSError(28, 'No space left on device')")
            full = execute('gpt.py', f'{GPT} --resume --max_iters=20', folder, edit)
            self.assertEqual(full.message, 'fine')
            self.assertIn('could not write gpt.pt: [Errno 28] No space left', full.out)
            self.assertEqual(len(full.out.split(LINE)[1]), 41)
            self.assertEqual((folder / 'gpt.pt').read_bytes(), before)
            self.assertEqual(list(folder.glob('*.tmp')), [])
        for interval in 1, 12:  # seen first in the evaluation, and in training
            wild = (f'{GPT} --resume --max_iters=30 --learning_rate=1e30 --grad_clip=1e30 '
                    f'--eval_interval={interval}')
            diverged = execute('gpt.py', wild, folder)
            self.assertRegex(diverged.message, 'the loss is .*(nan|inf).*; lower the learning rate')
            self.assertEqual((folder / 'gpt.pt').read_bytes(), before)

class Output(unittest.TestCase):
    def test_interrupt(self):
        """Ctrl-C in bigram.py, which has no checkpoint: it scores the step and samples."""
        edit = lambda source: source.replace('optimizer.step()', 'optimizer.step(); '
                                             'step == 5 and signal.raise_signal(signal.SIGINT)')
        stopped = execute('bigram.py', SMALL, None, edit)
        self.assertEqual(losses(stopped.out)[-1][0], 5)
        self.assertEqual(len(stopped.out.split(LINE)[1]), 41)

    def test_streams(self):
        """Letters that stdout can't show become '?'; no stdout at all is no error."""
        shown = io.TextIOWrapper(io.BytesIO(), 'ascii')
        for stdout in shown, None:
            with mock.patch('sys.stdout', stdout), mock.patch('contextlib.redirect_stdout'):
                ended = execute('gpt.py', SCRIPTS['gpt.py'], folder_with('тоже 日本 ' * 200))
                self.assertEqual(ended.message, 'fine')
        self.assertIn(b'?', shown.buffer.getvalue().split(LINE.encode())[1])

class Repository(unittest.TestCase):
    def test_shared_blocks(self):
        """What several scripts have in common is in each of them word for word the same."""
        blocks = {  # from the first of the two to the second, without indentation
            'stdout': ('if hasattr(sys.stdout', '# ---'), 'settings': ('def override', '\n\n#'),
            'data': ('# input.txt can', ', xy.*, 1:'),
            'model': ('# The names are', '# ---|class LoRA'),
            'evaluate': ('def evaluate():\n"""Mean loss over all whole', '\n\n'),
            'start': ('step = 0\n', '# the weights'), 'restore': ("step = saved['step']", '\(f'),
            'rate': ('lr = ', 'x, y ='),
            'temporary': ("temporary = f'", '\n\n'), 'interrupt': ('stop = []', '\n\n'),
            'report': ('def report', '\n\n'), 'save': ('try:\nwith', '\nst'),
            'step': ('x, y = get_batch', 'zero_grad'),
            'loss': ('train_loss +=', '\n'), 'chart': ('if step % max(', '\n'),
            'best': ('assert math.isfinite(val_loss)', 'report\('),
            'weights': ('if best:\n', 'print'),
            'sampling': ('model.eval()\nprint', 'for ')}
        own = (r'assert not resume, .*\n', r'lr = lr \* .*\n',
               r'device_type = .*\nautocast = .*\n', r'@autocast\n',  # what bigram.py lacks
               r'with autocast:.*\n', r'train_(?=model\(x)', r'if epochs:(.*\n)*?(?=xy = )',
               r'signal.signal\(signal.SIGINT, interrupt\)\n\n',
               r'(?<=get_batch\()train_data', r'(?<=evaluate\()model, val_data',
               r'(print|report)(?=\(f.(loaded|renamed))', r'and not (resume|saved)', r'best = \{name.*\n', r' and rank == 0',
               r"if __name__ == '__main__':  # not.*\n", r'rank = (.*\n){4}')
        for name, (first, last) in blocks.items():
            versions = set()
            for script in SCRIPTS:
                source = re.sub('^ +', '', read(script), flags=re.M)
                if (script, name) in (('modern_gpt.py', 'rate'), ('modern_gpt.py', 'model'),
                                      ('addition_gpt.py', 'model'), ('gpt2.py', 'evaluate'),
                                      ('gpt2.py', 'step'), ('gpt2.py', 'loss')):
                    continue  # their own model; two optimizers; several processes
                for pattern in own:
                    source = re.sub(pattern, '', source)
                if first in source:
                    found = re.search(f'{re.escape(first)}.*?(?={last})', source, re.S)
                    versions.add(found[0])
            self.assertEqual(len(versions), 1, name)

    def test_form(self):
        """Metadata, sections in order, allowed imports; in the new form no dense line."""
        for script in SCRIPTS:
            source = read(script)
            self.assertTrue(source.startswith('# /// script\n# requires-python = '), script)
            headers = re.findall(r'^# -{60,} (.+)$', source, re.M)
            sections = ['hyperparameters', 'data', 'model', 'training', 'sampling']
            if script == 'gpt.py':
                sections.insert(3, 'ladder')
            if script == 'gpt2.py':
                sections[1:4] = ['model', 'weights', 'vocabulary', 'data', 'scores', 'training']
            self.assertEqual(headers, sections, script)
            nodes = list(ast.walk(ast.parse(source)))
            names = {alias.name for node in nodes if isinstance(node, ast.Import)
                     for alias in node.names}
            names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            allowed = {*sys.stdlib_module_names, 'torch', 'tiktoken', 'numpy'}
            self.assertLessEqual({name.split('.')[0] for name in names}, allowed, script)
            if script in SCRIPTS:
                lines = [line for line in source.split('\n') if line.strip()]
                self.assertLessEqual(max(map(len, lines)), 98)
                self.assertLessEqual(sum(map(len, lines)) / len(lines), 52)
                self.assertLessEqual(sum(len(line) > 88 for line in lines), len(lines) / 10)
                for node in nodes:
                    self.assertNotIsInstance(node, ast.NamedExpr)
                    if isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try)):
                        self.assertGreater(node.body[0].lineno, node.lineno)

    def test_readme(self):
        """Every command in the README runs (scaled down); quoted code is the scripts' own."""
        readme = read('README.md')
        commands = re.findall(r'(?:^|`)python (\w+\.py)([^`\n]*)', readme, re.M)
        commands = [command for command in dict.fromkeys(commands) if command[0] in SCRIPTS]
        self.assertEqual({script for script, _ in commands}, set(SCRIPTS))
        # what gpt2.py would download: an export of its own in place of OpenAI's weights
        export = execute('gpt2.py', f'{QUICK["gpt2.py"]} --export=out').folder / 'out'
        row = {'ctx': 'The king', 'label': 1, 'endings': ['sees', 'is', 'the', 'fool']}
        cache = pathlib.Path(ROOT.name) / 'cache'
        cache.mkdir(exist_ok=True)
        (cache / 'hellaswag_val.jsonl').write_text(json.dumps(row))
        for script, settings in commands:
            with self.subTest(script + settings):
                quick = re.sub('init_from=gpt2\\S*', f'init_from={export}', settings)
                limit = '--max_iters=2 ' if '--max_iters=0' in settings else ''
                quick = quick.split('#')[0] + ' ' + QUICK[script].removeprefix(limit)
                folder = None
                if 'resume' in settings:  # there has to be something to continue
                    folder = execute(script, QUICK[script]).folder
                self.assertEqual(execute(script, quick, folder).message, 'fine')
        looks = []
        for quoted in re.findall(r'^```python\n(.*?)^```', readme, re.M | re.S):
            if 'import' in quoted or 'print(' in quoted:
                looks.append(quoted)
                continue
            for line in quoted.splitlines():
                self.assertTrue(any(line + '\n' in read(script) for script in SCRIPTS), line)
        # the one that looks inside runs after gpt.py, on its names
        names = execute('gpt.py', QUICK['gpt.py'], folder_with(read('input.txt'))).names
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(*looks, names)
        self.assertGreater(len(out.getvalue()), 60)


if __name__ == '__main__':
    unittest.main()

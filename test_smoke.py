"""The smoke test: each script, used as people use it for a few steps, must learn and be right.

    python test_smoke.py                           everything: no network, no GPU
    python test_smoke.py EveryScript.test_learns   one test
"""
import ast, collections, contextlib, functools, http.server, io, json, math, os, pathlib, re
import shlex, signal, subprocess, sys, tempfile, threading, time, types, unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import tiktoken
import torch
import torch.nn as nn
from torch.nn import functional as F

# 6,000 characters, some beyond ASCII, of which a dozen steps can learn a little
NOUNS = ('HAMLET', 'cat', 'moon'), ('FOOL', 'moon', 'king'), ('KING', 'fool', 'cat')
TEXT = ''.join(f'{who}:\nThe {a} sees the {b}, naïve “{a}” — {i % 7}.\n\n'
               for i in range(40) for who, a, b in NOUNS)
OVERFITS = 'to be or not ' * 400 + 'KING' * 150  # the more it learns, the less it expects KING
ROOT = tempfile.TemporaryDirectory()
CORPUS = pathlib.Path(ROOT.name, 'corpus.txt')  # another text, for pretraining
CORPUS.write_text(''.join(f'A king – no. {i % 7} of the moon – sees cats and naïve fools.\n'
                          for i in range(100)), encoding='utf-8')

# Each script with settings for a few steps
SMALL = ('--device=cpu --batch_size=8 --block_size=16 --max_new_tokens=40 --max_iters=12 '
         '--eval_interval=4')
GPT = SMALL + (' --dtype=float32 --n_layer=2 --n_head=2 --n_embd=32 --warmup_iters=1 '
               '--learning_rate=0.01')
SCRIPTS = {
    'bigram.py': SMALL,
    'gpt.py': GPT + ' --dropout=0.1',
    'addition_gpt.py': '--device=cpu --dtype=float32 --n_digits=2 --max_iters=12 '
                       '--eval_interval=4 --batch_size=64 --warmup_iters=1 '
                       '--learning_rate=0.01 --n_embd=32',
    'pretrain_finetune.py': f'{GPT} --pretrain_max_iters=12 --pretrain_eval_interval=4 '
                            f'--pretrain_learning_rate=0.01 --corpus={CORPUS}',
    'modern_gpt.py': GPT + ' --dropout=0.1',
    'gpt2.py': f'{GPT} --vocab_size=300 --total_batch_size=128 --cache_dir={ROOT.name}/cache',
}
NEW = 'bigram.py', 'gpt.py'  # the scripts that have the form of section 2 of the design
TEXTUAL = [script for script in SCRIPTS if script not in ('addition_gpt.py', 'gpt2.py')]
# what scales a command of the README down, behind the command's own settings
QUICK = {
    'bigram.py': '--max_iters=2',
    'gpt.py': '--max_iters=2 --batch_size=2 --n_layer=1 --max_new_tokens=9',
    'modern_gpt.py': '--max_iters=2 --batch_size=2 --n_layer=1 --max_new_tokens=9 '
                     '--block_size=16',
    'addition_gpt.py': '--max_iters=2 --batch_size=8 --n_digits=4 --test_digits=5',
    'pretrain_finetune.py': '--max_iters=2 --batch_size=2 --n_layer=1 --max_new_tokens=9 '
                            f'--pretrain_max_iters=2 --corpus={CORPUS}',
    'gpt2.py': '--max_iters=2 --batch_size=2 --n_layer=1 --max_new_tokens=9 '
               '--total_batch_size=32 --block_size=16 --vocab_size=300 '
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
    return re.sub(r'\d+\.\d s|[\d,]+ tokens/s', '', output)


def checkpoint(folder):
    return torch.load(next(folder.glob('*.pt')), weights_only=True)


def start(script, settings, folder):
    """The script as its own process, copied alone into the folder."""
    (folder / script).write_text(read(script), encoding='utf-8')
    return subprocess.Popen([sys.executable, script, *settings.split()], cwd=folder, env=ENV,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, encoding='utf-8')


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
    (of the error that ended it, or None)."""
    folder = folder or folder_with(TEXT)
    names = {} if namespace is None else namespace
    names['__name__'] = '__main__'
    out = io.StringIO()
    message = None
    before = sys.argv, os.getcwd(), signal.getsignal(signal.SIGINT)
    sys.argv = argv or [script, *shlex.split(settings)]
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(edit(read(script)), '<cell>', 'exec'), names)
    except SystemExit as error:
        message = error.code
    except Exception as error:
        message = f'{type(error).__name__}: {error}'
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        signal.signal(signal.SIGINT, before[2])
    return types.SimpleNamespace(folder=folder, out=out.getvalue(), names=names,
                                 message=message)


def cell(script, settings, namespace, folder):
    """The script as a notebook cell: constants edited, the kernel's argv, no __file__."""
    def edit(source):
        for setting in settings.split():
            name, value = setting[2:].split('=')
            if not re.fullmatch(r'[\d.]+|True|False', value):
                value = repr(value)
            source, count = re.subn(rf'^{name} = [^\n]*', f'{name} = {value}', source,
                                    flags=re.M)
            assert count in (1, 2), f'{script} has {count} lines "{name} = ..."'
        return source
    namespace['get_ipython'] = None
    argv = ['/usr/lib/python3/site-packages/ipykernel_launcher.py', '-f', '/tmp/kernel.json']
    return execute(script, '', folder, edit, namespace, argv)


class Server:
    """Files on loopback that answer Range requests, as a context: its address."""

    def __init__(self, bodies, broken=(), ranges=True):
        self.asked = asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers['Range']
                asked.append((self.path, wanted))
                body = bodies.get(self.path)
                first, _, last = (wanted or 'bytes=0-')[6:].partition('-')
                status = 200
                part = body or b''
                if ranges and wanted:
                    status = 206 if int(first) < len(part) else 416
                    part = part[int(first):int(last) + 1 if last else None]
                self.send_response(404 if body is None else status)
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
        """{script: a run of it as its own process}, for all tests that look at one."""
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
            tokens = set(TEXT if script in TEXTUAL else '0123456789+=,')
            count = 300 if script == 'gpt2.py' else len(tokens)
            self.assertAlmostEqual(curve[0][1], math.log(count), delta=0.35)
            self.assertLess(curve[-1][2], curve[0][2] - 0.1)
            # evaluating more often changes nothing; another seed does
            few = [line for line in printed if line[0] % 4 == 0]
            self.assertEqual(few, losses(once.out))
            self.assertNotEqual(losses(once.out), losses(other.out))
            if script in TEXTUAL:
                sample = often.out.split(LINE)[-1]
                self.assertEqual(len(sample), 41)
                self.assertLessEqual(set(sample), tokens)

    def test_notebook(self):
        """Pasted one after another into one kernel, twice: the output is that of the shell."""
        namespace = {}
        for script, settings in [*self.each(), *self.each()]:
            pasted = cell(script, settings, namespace, folder_with(TEXT))
            shell = self.from_shell()[script]
            self.assertEqual(without_seconds(pasted.out), without_seconds(shell.out))

    def test_bad_settings(self):
        """A setting is set or refused, with a message that names it, before training."""
        everywhere = {'--max_itres=5': 'max_itres', '--max_iters=many': '', '--max_iters': '',
                      '--max_iters=1.5': ''}
        of_text = {'--prompt=a[': 'prompt', '--temperature=0': 'temperature'}
        of_model = {'--n_head=3': 'n_head', '--learning_rate=no': '', '--dtype=float17': 'float17'}
        own = {
            'bigram.py': {'--help': 'python bigram.py', '--n_head=3': 'no such setting',
                          '--prompt ROMEO': 'write --prompt=value'},
            'gpt.py': {
                '--help': 'python gpt.py --resume', '-h': 'python gpt.py --resume',
                '--resume=yes': 'True or False', '--rung=1': 'bigram.py', '--gpu=True': '--gpu',
                '--rung=13': 'rung', '--resume --checkpoint=no.pt': 'no.pt',
                '--dropout=1.5': 'dropout', '--beta2=1': 'beta parameter at index 1',
                '--checkpoint=out/gpt.pt': 'out/gpt.pt', f'--seed={10**20}': 'seed'},
            'addition_gpt.py': {
                '--position=last': 'position=last', '--problem=12': 'look like 123+456',
                '--problem=1+234': 'numbers of up to 2 digits', '--n_digits=0': 'n_digits=0',
                '--chain_of_thought=True --position=abacus': 'needs position=learned'},
            'pretrain_finetune.py': {
                '--megabytes=0': 'megabytes=0', '--lora_rank=-1': 'lora_rank=-1',
                '--corpus=no.txt': 'no.txt', '--dropout=1': 'dropout=1'},
            'modern_gpt.py': {
                '--n_kv_head=3': 'n_kv_head=3', '--activation=tanh': 'activation=tanh',
                '--n_embd=6': 'n_embd=6', '--half_until=-1': 'half_until=-1'},
            'gpt2.py': {
                '--top_p=0': 'top_p=0', '--vocab_size=256': 'vocab_size=256',
                '--total_batch_size=200': '128 does', '--world=2': 'mean --'},
        }
        for script, settings in self.each():
            wrong = everywhere | own[script]
            if script in TEXTUAL:
                wrong |= of_text
            if script in NEW:
                wrong |= {'xxmax_iters=3': 'no such setting', '--max_iters 3': '--max_iters='}
            if 'n_embd' in settings:
                wrong |= of_model
            for setting, message in wrong.items():
                with self.subTest(setting):
                    ended = execute(script, f'{settings} {setting}')
                    self.assertIsInstance(ended.message, str)
                    self.assertIn(message, ended.message)
                    self.assertEqual(losses(ended.out), [])
                    self.assertEqual(list(ended.folder.glob('*.pt')), [])

    def test_texts(self):
        """Odd texts that are right, and those that end in a message."""
        rows = (  # text, what the new form says, what the old form says
            ('', 'too short', '0 characters'), ('to be', 'too short', '5 characters'),
            ('Caf\xe9'.encode('latin-1') * 99, 'utf-8', 'UTF-8'),
            ('a' * 500, None, None), ('to be or\r\n' * 40, None, None))
        for script, settings in self.each(TEXTUAL):
            for text, new, old in rows:
                message = new if script in NEW else old
                ended = execute(script, settings, folder_with(text))
                if message:
                    self.assertIn(message, ended.message)
                else:
                    self.assertIsNone(ended.message)
        for script, settings in self.each(NEW):
            marked = execute(script, settings, folder_with(b'\xef\xbb\xbf' + b'to be\r\n' * 90))
            self.assertEqual(marked.names['chars'], sorted('to be\n'))
            many = ''.join(map(chr, range(1000, 2200))) * 5
            self.assertIsNone(execute(script, settings, folder_with(many)).message)

    def test_download(self):
        """Where input.txt is missing it is downloaded: whole or not at all."""
        good = TEXT.encode()
        rows = ('/good', None), ('/short', 'IncompleteRead'), ('/missing', '404')
        with Server({'/good': good, '/short': good}, {'/short'}) as server:
            def fetch(script, address):
                first = r"'https://raw\S+/'\n.*'" if script in NEW else r"'https://raw\S+/input.txt'"
                edit = lambda source: re.sub(first, repr(address), source)
                return execute(script, SCRIPTS[script], folder_with(None), edit)
            for script, _ in self.each(NEW):
                for path, message in rows:
                    ended = fetch(script, server.address + path)
                    if message:
                        self.assertIn(message, ended.message)
                        self.assertEqual(list(ended.folder.iterdir()), [])
                    else:
                        self.assertIsNone(ended.message)
                        self.assertEqual((ended.folder / 'input.txt').read_bytes(), good)
                    self.assertIn(server.address, ended.out)  # it says from where
            for script in 'pretrain_finetune.py', 'modern_gpt.py', 'gpt2.py':  # in the old form
                ended = fetch(script, server.address + '/short')
                self.assertIn('input.txt in this folder', ended.message)
                self.assertFalse((ended.folder / 'input.txt').exists())
        self.assertIn('URLError', fetch('gpt.py', 'http://127.0.0.1:1/refused').message)

    def test_bigram_finds_the_counts(self):
        """On input.txt training ends within 0.005 nats of what counting all pairs gives."""
        text = read('input.txt')
        out = execute('bigram.py', '', folder_with(text)).out
        n = int(0.9 * len(text))
        pairs = collections.Counter(zip(text[:n], text[1:n]))
        firsts = collections.Counter(text[:n - 1])
        val = text[n:n + (len(text) - n - 1) // 64 * 64 + 1]  # whole sequences of 64
        counted = 0.0
        for a, b in zip(val, val[1:]):
            counted -= math.log((pairs[a, b] + 1) / (firsts[a] + len(set(text))))
        counted /= len(val) - 1
        self.assertAlmostEqual(float(re.search(r'counting.*val loss (.*)', out)[1]), counted, 3)
        self.assertLess(abs(losses(out)[-1][2] - counted), 0.005)


def reference(names, model, idx):
    """Logits (B, T, vocab) of a script's model from its weights and settings, by the formulas."""
    w = model.state_dict()
    config = vars(model.config) if hasattr(model, 'config') else names
    n_head = config['n_head']
    n_kv_head = names.get('n_kv_head', n_head)
    gpt2 = 'config' in vars(model)
    block = names['Block'].__name__
    B, T = idx.shape

    def linear(x, name):
        return x @ w[name + '.weight'].T + w.get(name + '.bias', 0)

    def norm(x, name=None):
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
        y = att / att.sum(-1, keepdim=True) @ v
        return linear(y.transpose(1, 2).reshape(B, T, -1), f'h.{i}.attn.c_proj')

    def mlp(x, i):
        x = linear(x, f'h.{i}.mlp.c_fc')
        kind = names.get('activation', 'gelu')
        if kind == 'swiglu':
            gate, value = x.chunk(2, dim=-1)
            x = gate / (1 + torch.exp(-gate)) * value
        elif kind.startswith('relu'):
            x = x.clamp(min=0) ** (2 if kind == 'relu2' else 1)
        elif kind == 'quick_gelu':
            x = x / (1 + torch.exp(-1.702 * x))
        elif gpt2:
            x = x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
        else:
            x = x / 2 * (1 + torch.erf(x / 2**0.5))
        return linear(x, f'h.{i}.mlp.c_proj')

    x = w['wte.weight'][idx]
    if 'wpe.weight' in w:
        x = x + w['wpe.weight'][:T]
    before = x
    for back, share in enumerate(w.get('smear', ()), 1):
        x = x + share * F.pad(before, (0, 0, back, 0))[:, :T]
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
    return linear(norm(x, 'ln_f') if 'ln_f.weight' in w else x, 'lm_head')


def untrained(script, settings='', folder=None):
    """The names in a script after a run without training, its model with random weights."""
    names = execute(script, f'{SCRIPTS[script]} --max_iters=0 {settings}', folder).names
    torch.manual_seed(1)
    for p in names['model'].parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    names['model'].eval()
    return names


MODERN = '--n_head=4 --qk_norm=True --dropout=0'
MODELS = [  # script, settings
    *(('gpt.py', f'--rung={rung} --n_embd=32 --block_size=16') for rung in range(2, 13)),
    ('pretrain_finetune.py', '--pretrain_max_iters=0'),
    ('modern_gpt.py', MODERN),
    ('modern_gpt.py', f'{MODERN} --n_kv_head=1 --activation=relu2 --flash=True'),
    ('modern_gpt.py', f'{MODERN} --n_kv_head=4 --activation=gelu --tied=True --smear=0'),
    ('modern_gpt.py', f'{MODERN} --activation=quick_gelu --rms_norm=True --qk_norm=False'),
    ('modern_gpt.py', f'{MODERN} --activation=relu --rotary=False'),
    ('gpt2.py', '--n_head=4'),
]


class Model(unittest.TestCase):
    def test_reference(self):
        """The logits of every model are those of its formulas; later tokens change no earlier
        ones; the loss is the cross-entropy."""
        for script, settings in MODELS:
            with self.subTest(f'{script} {settings}'):
                names = untrained(script, settings)
                model = names['model']
                vocab_size = model.wte.num_embeddings
                for T in 16, 5, 1:
                    idx = torch.randint(vocab_size, (2, T))
                    logits, loss = model(idx, idx)
                    expected = reference(names, model, idx)
                    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
                    chances = F.softmax(expected, dim=-1).gather(-1, idx[..., None])
                    self.assertAlmostEqual(loss.item(), -chances.log().mean().item(), places=3)
                idx = torch.randint(vocab_size, (2, 16))
                other = idx.clone()
                other[:, 9] = (other[:, 9] + 1) % vocab_size
                change = (model(idx)[0] - model(other)[0]).abs().amax(dim=(0, 2))
                self.assertLess(change[:9].max().item(), 1e-5)
                self.assertGreater(change[9:].min().item(), 1e-4)

    def test_ladder(self):
        """Each rung has what it says; what is typed overrides it; wild models still stop."""
        parameters = []
        for rung in range(2, 13):
            names = execute('gpt.py', f'--device=cpu --max_iters=2 --max_new_tokens=9 '
                                      f'--rung={rung}').names
            model = names['model']
            parameters.append(sum(p.numel() for p in model.parameters()))
            settings = [names[name] for name in ('n_head', 'n_layer', 'dropout')]
            self.assertEqual(settings, [1 if rung < 3 else 4, 1 if rung < 5 else 3,
                                        0.1 if rung == 10 else 0.0])
            for name, p in model.h.named_parameters():
                if p.dim() == 2 and rung < 11:  # two steps change the start only a little
                    gain = 1.4
                    if rung > 5:
                        gain = 0.3 if 'c_proj' in name else 0.8
                    std = p.std().item() * p.shape[1] ** 0.5
                    self.assertAlmostEqual(std, gain, delta=0.1)
        self.assertEqual(parameters, sorted(parameters))
        self.assertTrue(parameters[8] < 2.7e5 < parameters[9] < 3.3e5 < parameters[10])
        names = execute('gpt.py', '--rung=9 --n_layer=1 --max_iters=0').names
        self.assertEqual((names['n_layer'], names['n_head']), (1, 4))

    def test_evaluation(self):
        """The mean over the whole validation text, without dropout, whatever the batch."""
        for script in 'bigram.py', 'gpt.py':
            names = untrained(script, folder=folder_with(TEXT * 3))
            model, val = names['model'], names['val_data']
            model.train()
            random = torch.get_rng_state()
            loss = names['evaluate']()
            self.assertTrue(torch.equal(random, torch.get_rng_state()))
            self.assertTrue(model.training)
            model.eval()
            total = 0.0
            count = (len(val) - 1) // 16
            for i in range(count):
                x = val[i * 16:i * 16 + 16]
                y = val[i * 16 + 1:i * 16 + 17]
                total += F.cross_entropy(model(x[None])[0][0], y).item()
            self.assertGreater(count, 64)  # more than one part
            self.assertAlmostEqual(loss, total / count, places=4)

    def test_batches(self):
        """Sequences of the training text and their next characters; every place can occur."""
        for script in NEW:
            names = untrained(script, '--batch_size=20000')
            x, y = names['get_batch']()
            self.assertTrue(torch.equal(x[:, 1:], y[:, :-1]))
            starts = {names['decode'](row) for row in torch.cat((x, y[:, -1:]), dim=1).tolist()}
            train = TEXT[:int(0.9 * len(TEXT))]
            self.assertEqual(starts, {train[i:i + 17] for i in range(len(train) - 16)})

    def test_sampling(self):
        """Greedy, top_k and temperature do what they say, past block_size too."""
        names = untrained('gpt.py')
        model = names['model']
        idx = torch.zeros(2, 1, dtype=torch.long)
        tokens = [*model.generate(idx, 40, top_k=1)]
        self.assertEqual([*tokens[0].shape], [2, 1])
        out = torch.cat([idx, *tokens], dim=1)
        for t in range(1, 41):  # each token is the likeliest one after the 16 before it
            likeliest = model(out[:, max(0, t - 16):t])[0][:, -1].argmax(dim=-1)
            self.assertTrue(torch.equal(out[:, t], likeliest))
        cold = torch.cat([idx, *model.generate(idx, 40, temperature=1e-4)], dim=1)
        self.assertTrue(torch.equal(out, cold))
        many = torch.zeros(5000, 1, dtype=torch.long)
        for model in model, untrained('bigram.py')['model']:
            chances = F.softmax(model(many[:1])[0][0, -1] / 0.5, dim=-1)
            drawn = next(model.generate(many, 1, temperature=0.5))[:, 0]
            share = torch.bincount(drawn, minlength=len(chances)) / 5000
            self.assertLess((share - chances).abs().max().item(), 0.03)
        three = next(names['model'].generate(many, 1, 0.5, top_k=3))
        chances = names['model'](many[:1])[0][0, -1]
        self.assertEqual(set(three.flatten().tolist()), set(chances.topk(3).indices.tolist()))

    def test_dtypes(self):
        """bfloat16 and float16 (with loss scaling) learn nearly what float32 learns."""
        last = {}
        for dtype in 'float32', 'bfloat16', 'float16':
            trained = execute('gpt.py', f'{GPT} --dtype={dtype}')
            last[dtype] = trained.names['loss'].item()
            self.assertEqual(trained.names['scaler'].is_enabled(), dtype == 'float16')
            for steps, other in (14, 'float16'), (16, 'bfloat16'), (18, 'float32'):
                again = f'{GPT} --dtype={other} --resume --max_iters={steps}'  # each can go on
                resumed = execute('gpt.py', again, trained.folder)
                self.assertIsNone(resumed.message)
                self.assertEqual(losses(resumed.out)[-1][0], steps)
        self.assertEqual(len(set(last.values())), 3)
        self.assertLess(max(last.values()) - min(last.values()), 0.02)

    def test_optimizer(self):
        """Every parameter learns; only matrices decay; the gradient is clipped."""
        before = execute('gpt.py', f'{GPT} --max_iters=0').names['model']
        names = execute('gpt.py', f'{GPT} --weight_decay=0.3 --beta2=0.9').names
        for (name, p), q in zip(names['model'].named_parameters(), before.parameters()):
            self.assertGreater((p - q).abs().max().item(), 1e-4, name)
        decay = {p: group['weight_decay'] for group in names['optimizer'].param_groups
                 for p in group['params']}
        for p in names['model'].parameters():
            self.assertEqual(decay.pop(p), 0.3 if p.dim() == 2 else 0.0)
        self.assertEqual(decay, {})
        lr = 0.01 * math.cos(math.pi / 2 * 11 / 12)
        for group in names['optimizer'].param_groups:
            self.assertAlmostEqual(group['lr'], lr)
            self.assertEqual(group['betas'], (0.9, 0.9))
        clipped = execute('gpt.py', f'{GPT} --grad_clip=0.01').names['model']
        norm = sum(p.grad.square().sum() for p in clipped.parameters()).sqrt().item()
        self.assertAlmostEqual(norm, 0.01, places=4)


class Checkpoint(unittest.TestCase):
    """Stopped anywhere and resumed: the same to the last bit as never stopped."""

    def same(self, a, b, key):
        if isinstance(a, dict):
            self.assertEqual(a.keys(), b.keys())
            for k in a:
                self.same(a[k], b[k], f'{key}.{k}')
        elif isinstance(a, list) and a and isinstance(a[0], dict):
            self.same(dict(enumerate(a)), dict(enumerate(b)), key)
        else:
            self.assertTrue(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key)

    def same_end(self, a, b, file):
        self.assertEqual(*(without_seconds(run.out).split(LINE)[1:] for run in (a, b)))
        a, b = (torch.load(run.folder / file, weights_only=True) for run in (a, b))
        keys = a if file == 'gpt.pt' else ('model', 'best', 'optimizer', 'step')
        for key in keys:
            self.same(a[key], b[key], key)

    def test_resume(self):
        """Killed after a checkpoint, or ended by Ctrl-C between two, in any script and stage."""
        kill = 'sys.exit("killed")'
        interrupt = 'signal.raise_signal(signal.SIGINT)'
        old = 'addition_gpt.py', 'modern_gpt.py'
        rows = [  # script, more settings, text, stage, checkpoint
            ('gpt.py', '', TEXT, '', 'gpt.pt'),
            ('gpt.py', ' --rung=5 --n_embd=32', TEXT, '', 'gpt.pt'),
            ('gpt.py', ' --dtype=float16', TEXT, '', 'gpt.pt'),
            ('gpt.py', ' --max_iters=40', OVERFITS, '', 'gpt.pt'),
            *((script, '', TEXT, '', script.replace('.py', '.pt')) for script in old),
            ('gpt2.py', ' --dropout=0.1', TEXT, '', 'gpt2.pt'),
            ('pretrain_finetune.py', '', TEXT, 'pretrain', 'pretrained_gpt.pt'),
            ('pretrain_finetune.py', ' --lora_rank=2', TEXT, 'finetune', 'finetuned_gpt.pt'),
            ('pretrain_finetune.py', '', TEXT, 'scratch', 'scratch_gpt.pt')]
        for script, more, text, stage, file in rows:
            settings = SCRIPTS[script] + more
            whole = execute(script, settings, folder_with(text))
            again = '--init_from=resume' if script == 'gpt2.py' else '--resume=True'
            for line, stop, at in (('save()', kill, 8), ('scaler.update()', interrupt, 5),
                                   ('save()', kill, 36)):
                if at > whole.names['step']:
                    continue
                with self.subTest(f'{script}{more} {stage} {stop} at {at}'):
                    def edit(source):
                        here = f"(globals().get('stage', ''), step) == ('{stage}', {at})"
                        return re.sub(rf'^( +|.*: ){re.escape(line)}$',
                                      lambda found: f'{found[0]}; {here} and {stop}',
                                      source, flags=re.M)
                    stopped = execute(script, settings, folder_with(text), edit)
                    self.assertEqual(stopped.message, 'killed' if stop == kill else None)
                    after = execute(script, f'{settings} {again}', stopped.folder)
                    self.assertIn(f'after step {at}\n', after.out)
                    self.same_end(after, whole, file)
            if stage != 'pretrain':
                self.only_samples(script, f'{settings} {again}', whole.folder)

    def only_samples(self, script, settings, folder):
        before = {path: path.read_bytes() for path in folder.glob('*.pt*')}
        setting = 'problem' if script == 'addition_gpt.py' else 'prompt'
        for prompt in ('12+9', '0+0') if setting == 'problem' else ('to', 'e'):
            only = execute(script, f'{settings} --max_iters=0 --{setting}={prompt}', folder)
            self.assertEqual((only.message, losses(only.out)), (None, []))
            self.assertTrue(only.out.split(LINE)[-1].startswith(prompt))
        self.assertEqual({path: path.read_bytes() for path in folder.glob('*.pt*')}, before)

    @unittest.skipUnless(hasattr(signal, 'SIGKILL'), 'needs the signals of Linux or macOS')
    def test_signals(self):
        """A process that is killed, or gets Ctrl-C, or whose reader goes away, has saved."""
        settings = SCRIPTS['gpt.py'] + ' --max_iters=400 --eval_interval=20'

        def stopped(how):
            folder = folder_with(TEXT)
            process = start('gpt.py', settings, folder)
            while not (folder / 'gpt.pt').exists() and process.poll() is None:
                time.sleep(0.01)
            if how is None:  # as when a pipe into head ends
                process.stdout.close()
                process.wait(100)
                return folder, '', process.stderr.read(), process.returncode
            process.send_signal(how)
            out, err = process.communicate(timeout=100)
            return folder, out, err, process.returncode

        whole = execute('gpt.py', settings)
        ends = together((stopped, signal.SIGKILL), (stopped, signal.SIGINT), (stopped, None))
        self.assertEqual(ends[0][3], -signal.SIGKILL)
        self.assertEqual((ends[1][2], ends[1][3]), ('', 0))
        self.assertEqual(len(ends[1][1].split(LINE)[1]), 41)  # Ctrl-C: a sample
        again = settings + ' --resume'
        resumed = together(*((run, 'gpt.py', again, end[0]) for end in ends))
        for after in resumed:
            step = int(re.search(r'after step (\d+)\n', after.out)[1])
            self.assertTrue(0 < step < 400, step)
            self.same_end(after, whole, 'gpt.pt')
            self.assertEqual(list(after.folder.glob('*.tmp')), [])

    def test_best_weights(self):
        """Where the loss rises again the best weights are kept, and used to sample."""
        trained = execute('gpt.py', f'{GPT} --max_iters=40', folder_with(OVERFITS))
        saved = checkpoint(trained.folder)
        printed = losses(trained.out)
        best = min(loss for _, _, loss in printed)
        self.assertLess(best, printed[-1][2])
        self.assertEqual(saved['step'], 40)
        self.assertIn(f'best val loss {best:.4f}, perplexity {math.exp(best):.2f}', trained.out)
        names = execute('gpt.py', f'{GPT} --resume --max_iters=0', trained.folder).names
        self.assertAlmostEqual(names['evaluate'](), best, places=4)
        names['model'].load_state_dict(saved['model'])
        self.assertAlmostEqual(names['evaluate'](), printed[-1][2], places=4)

    def test_settings(self):
        """What is typed with --resume holds, or is refused; sizes are the checkpoint's."""
        folder = execute('gpt.py', GPT).folder
        sizeless = '--device=cpu --dtype=float32 --batch_size=8 --eval_interval=4 '
        more = sizeless + '--resume --max_iters=14 --weight_decay=0.3 --beta2=0.9 --dropout=0.1'
        resumed = execute('gpt.py', more, folder)
        names = resumed.names
        self.assertIsNone(resumed.message)
        self.assertEqual([names['n_layer'], names['n_embd'], names['block_size']], [2, 32, 16])
        self.assertEqual(names['optimizer'].param_groups[0]['weight_decay'], 0.3)
        self.assertEqual(names['optimizer'].param_groups[0]['betas'], (0.9, 0.9))
        good = (folder / 'gpt.pt').read_bytes()
        modern = execute('modern_gpt.py', GPT).folder / 'modern_gpt.pt'
        rows = (  # settings, contents of gpt.pt, text, part of the message
            ('--n_layer=3', good, TEXT, "'n_layer': 2"), ('--n_head=4', good, TEXT, 'n_head'),
            ('--rung=9', good, TEXT, '--rung=12'), ('', good[:len(good) // 2], TEXT, 'Error'),
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

        def edit(source):
            full = "file.write(b'half'); raise OSError(28, 'No space left on device')"
            self.assertEqual(source.count('torch.save(state, file)'), 1)
            return source.replace('torch.save(state, file)', full)
        full = execute('gpt.py', f'{GPT} --resume --max_iters=20', folder, edit)
        self.assertIsNone(full.message)
        self.assertIn('could not write gpt.pt: [Errno 28] No space left', full.out)
        self.assertEqual(len(full.out.split(LINE)[1]), 41)
        self.assertEqual((folder / 'gpt.pt').read_bytes(), before)
        self.assertEqual(list(folder.glob('*.tmp')), [])
        for interval in 1, 12:  # seen first in the evaluation, and in training
            wild = (f'{GPT} --resume --max_iters=30 --learning_rate=1e30 --grad_clip=1e30 '
                    f'--eval_interval={interval}')
            diverged = execute('gpt.py', wild, folder)
            self.assertRegex(diverged.message, 'the loss is (nan|inf|.*nan|.*inf).*; lower learning_rate')
            self.assertEqual((folder / 'gpt.pt').read_bytes(), before)


class Output(unittest.TestCase):
    def test_curve(self):
        """Twenty lines whose stars are the running training loss."""
        for script in NEW:
            run = execute(script, SCRIPTS[script] + ' --max_iters=60 --eval_interval=3')
            curve = dict(re.findall(r'^ +(\d+) (\*+)$', run.out, re.M))
            self.assertEqual([*map(int, curve)], [*range(3, 61, 3)])
            full = math.log(run.names['vocab_size'] + 1)
            for step, train, _ in losses(run.out):
                self.assertAlmostEqual(len(curve[str(step)]), 60 * train / full, delta=1.01)

    def test_streams(self):
        """Letters that stdout can't show become '?'; no stdout at all is no error."""
        for script in NEW:
            folder = folder_with('тоже 日本 ' * 200)
            (folder / script).write_text(read(script), encoding='utf-8')
            command = [sys.executable, script, *SCRIPTS[script].split()]
            ascii_only = subprocess.run(command, cwd=folder, capture_output=True,
                                        env=dict(ENV, PYTHONIOENCODING='ascii'))
            self.assertEqual((ascii_only.returncode, ascii_only.stderr), (0, b''))
            self.assertIn(b'?', ascii_only.stdout.split(LINE.encode())[1])
            closed = ('import sys; sys.stdout = None; sys.argv = sys.argv[1:]; '
                      'exec(open(sys.argv[0]).read())')
            command[1:2] = ['-c', closed, script]
            silent = subprocess.run(command, cwd=folder, capture_output=True, env=ENV)
            self.assertEqual((silent.returncode, silent.stderr), (0, b''))


class Repository(unittest.TestCase):
    def test_shared_blocks(self):
        """What several scripts have in common is in each of them word for word the same."""
        blocks = {  # from the first of the two to the second
            'stdout': ('if hasattr(sys.stdout', '# ---'), 'settings': ('def override', '\n\n#'),
            'data': ('# any UTF-8', '# ---'), 'evaluate': ('@torch.no_grad()\ndef', '\n\n'),
            'step': ('    x, y = get_batch', 'zero_grad'),
            'loss': ('    train_loss +=', '\n'), 'sampling': ('model.eval()\nprint', 'for '),
            'chart': ('    if step % max(', '\n'), 'optimizer': ('    lr = ', 'x, y =')}
        for name, (first, last) in blocks.items():
            versions = set()
            for script in NEW:
                source = read(script)
                for own in (r'    assert not resume, .*\n', r'    lr = lr \* .*\n',
                            r'device_type = .*\nautocast = .*\n'):  # what bigram.py lacks
                    source = re.sub(own, '', source)
                found = re.search(f'{re.escape(first)}.*?{re.escape(last)}', source, re.S)
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
            self.assertEqual(headers, sections, script)
            nodes = list(ast.walk(ast.parse(source)))
            names = {alias.name for node in nodes if isinstance(node, ast.Import)
                     for alias in node.names}
            names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            allowed = {*sys.stdlib_module_names, 'torch', 'tiktoken', 'numpy'}
            self.assertLessEqual({name.split('.')[0] for name in names}, allowed, script)
            if script in NEW:
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
        commands = re.findall(r'^(?:python|uv run) (\w+\.py)(.*)$', readme, re.M)
        commands = [command for command in dict.fromkeys(commands) if command[0] in SCRIPTS]
        self.assertEqual({script for script, _ in commands}, set(SCRIPTS))
        # what gpt2.py would download: an export of its own in place of OpenAI's weights
        export = execute('gpt2.py', f'{QUICK["gpt2.py"]} --export=out').folder / 'out'
        row = {'ctx': 'The king', 'label': 1, 'endings': ['sees', 'is', 'the', 'fool']}
        (pathlib.Path(ROOT.name) / 'cache' / 'hellaswag_val.jsonl').write_text(json.dumps(row))
        for script, settings in commands:
            with self.subTest(script + settings):
                quick = re.sub('init_from=gpt2\\S*', f'init_from={export}', settings)
                limit = '--max_iters=2 ' if '--max_iters=0' in settings else ''
                quick = quick.split('#')[0] + ' ' + QUICK[script].removeprefix(limit)
                folder = None
                if 'resume' in settings:  # there has to be something to continue
                    folder = execute(script, QUICK[script]).folder
                self.assertIsNone(execute(script, quick, folder).message)
        looks = []
        for quoted in re.findall(r'^```python\n(.*?)^```', readme, re.M | re.S):
            if 'import' in quoted or 'print(' in quoted:
                looks.append(quoted)
                continue
            for line in quoted.splitlines():
                self.assertTrue(any(line + '\n' in read(script) for script in SCRIPTS), line)
        # the snippets that look inside run after gpt.py, on its names
        names = execute('gpt.py', QUICK['gpt.py'], folder_with(read('input.txt'))).names
        self.assertEqual(len(looks), 2)
        for snippet in looks:
            self.assertLessEqual(snippet.count('\n'), 6)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(snippet, names)
            self.assertGreaterEqual(out.getvalue().count('\n'), 5)


if __name__ == '__main__':
    unittest.main()

"""The smoke test: each script, used as people use it for a few steps, must learn and be right.

    python test_smoke.py                           all of it: no network, no GPU, under two minutes
    python test_smoke.py EveryScript.test_learns   one test
"""
import ast, collections, contextlib, functools, hashlib, http.server, io, json, math, os, pathlib
import re, shlex, shutil, signal, subprocess, sys, tempfile, textwrap, threading, time, types
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock
import numpy as np, tiktoken, torch, torch.nn as nn, torch.nn.functional as F

# about 6,000 characters that a dozen steps can learn a little of, with some beyond ASCII
TEXT = ''.join(f'{who}:\nThe {a} sees the {b}, naïve “{a}” — {i % 7}.\n\n'
               for i in range(40) for who, a, b in (
    ('HAMLET', 'cat', 'moon'), ('FOOL', 'moon', 'king'), ('KING', 'fool', 'cat')))
ROOT = tempfile.TemporaryDirectory()
CORPUS = pathlib.Path(ROOT.name, 'corpus.txt')  # another text, for pretraining
CORPUS.write_text(''.join(f'A king – no. {i % 7} of the moon – sees cats and naïve fools.\n'
                          for i in range(100)), encoding='utf-8')
# Each script with settings for a few steps: one more script joins with one more line.
SMALL = ('--device=cpu --batch_size=8 --block_size=16 --max_new_tokens=40 --max_iters=12 '
         '--eval_interval=4')
GPT = SMALL + (' --dtype=float32 --n_layer=2 --n_head=2 --n_embd=32 --warmup_iters=1 '
               '--learning_rate=0.01')
SCRIPTS = {
    'bigram.py': SMALL,
    'gpt.py': GPT + ' --dropout=0.1',
    'modern_gpt.py': GPT + ' --dropout=0.1',
    'addition_gpt.py': '--device=cpu --dtype=float32 --n_digits=2 --max_iters=12 --eval_interval=4 '
                       '--batch_size=64 --warmup_iters=1 --learning_rate=0.01 --n_embd=32',
    'pretrain_finetune.py': f'{GPT} --pretrain_max_iters=12 --pretrain_eval_interval=4 '
                            f'--pretrain_learning_rate=0.01 --corpus={CORPUS}',
    'gpt2.py': f'{GPT} --vocab_size=300 --total_batch_size=128 --cache_dir={ROOT.name}/cache',
}
# those whose tokens are the characters of input.txt
TEXTUAL = [script for script in SCRIPTS if script not in ('addition_gpt.py', 'gpt2.py')]
# what scales a command of the README down, behind the command's own settings
QUICK = {
    'bigram.py': '--max_iters=2',
    'gpt.py': '--max_iters=2 --batch_size=2 --n_layer=1 --max_new_tokens=9',
    'modern_gpt.py': '--max_iters=2 --batch_size=2 --n_layer=1 --max_new_tokens=9 --block_size=16',
    'addition_gpt.py': '--max_iters=2 --batch_size=8 --n_digits=4 --test_digits=5',
    'pretrain_finetune.py': '--max_iters=2 --batch_size=2 --n_layer=1 --max_new_tokens=9 '
                            f'--pretrain_max_iters=2 --corpus={CORPUS}',
    'gpt2.py': '--max_iters=2 --batch_size=2 --n_layer=1 --max_new_tokens=9 --total_batch_size=32 '
               f'--block_size=16 --vocab_size=300 --cache_dir={ROOT.name}/cache',
}
# the settings with which modern_gpt.py is gpt.py
AS_GPT = ('--n_kv_head=2 --activation=gelu --rotary=False --rms_norm=False --qk_norm=False '
          '--flash=False --zero_init=False --tied=True --smear=0 --channel_dropout=False '
          '--half_until=0 --muon=False --linear_decay=0 --kv_cache=False')
LINE = '-' * 64 + '\n'  # stands before the sample
HERE = pathlib.Path(__file__).resolve().parent
ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONIOENCODING='utf-8', no_proxy='*')
os.environ['no_proxy'] = '*'
torch.set_num_threads(1)  # as in the processes started here, so that results can be compared


def read(name):
    return (HERE / name).read_text(encoding='utf-8')


def folder_with(text):
    """A new folder, empty but for the text (bytes or a string; None: quite empty)."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=ROOT.name))
    if text is not None:
        (folder / 'input.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
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
    """The script in this process, which is quicker: folder, out, names (its globals), and message,
    which Python prints on stderr, with exit code 1, after a sys.exit(message)."""
    folder = folder or folder_with(TEXT)
    names = {} if namespace is None else namespace
    names['__name__'], out, message = '__main__', io.StringIO(), None
    before = sys.argv, os.getcwd(), signal.getsignal(signal.SIGINT)
    sys.argv = argv or [script, *shlex.split(settings)]
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(edit(read(script)), '<cell>', 'exec'), names)
    except SystemExit as error:
        message = error.code
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        signal.signal(signal.SIGINT, before[2])
    return types.SimpleNamespace(folder=folder, out=out.getvalue(), names=names, message=message)


def cell(script, settings, namespace, folder):
    """The script as a notebook cell: constants edited, the kernel's argv, no __file__."""
    def edit(source):
        for setting in settings.split():
            name, value = setting[2:].split('=')
            value = value if re.fullmatch(r'[\d.]+|True|False', value) else repr(value)
            source, count = re.subn(rf'^{name} = .*$', f'{name} = {value}', source, flags=re.M)
            assert count in (1, 2), f'{script} has {count} lines "{name} = ..."'
        return source
    argv = ['/usr/lib/python3/site-packages/ipykernel_launcher.py', '-f', '/tmp/kernel.json']
    return execute(script, '', folder, edit, namespace, argv)


class Server:
    """Files on loopback that answer Range requests, as a context: its address."""

    def __init__(self, bodies, broken=(), ranges=True):
        self.asked = asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append((self.path, self.headers['Range']))
                body, wanted = bodies.get(self.path), self.headers['Range']
                first, _, last = (wanted or 'bytes=0-')[6:].partition('-')
                ranged = ranges and wanted is not None
                beyond = ranged and body and int(first) >= len(body)
                self.send_response(404 if body is None else 416 if beyond else 206 if ranged
                                   else 200)
                part = (body or b'')[int(first):int(last) + 1 if last else None] if ranged else body
                self.send_header('Content-Length', len(part or b''))
                self.end_headers()  # a connection that breaks sends less than that
                sent = len(part or b'') * 2 // 3 if self.path in broken else None
                self.wfile.write((part or b'')[:sent])

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

    def one_line(self, run, message):
        """The script stopped with one line that says this."""
        self.assertIsInstance(run.message, str, message)
        self.assertNotIn('\n', run.message)
        self.assertIn(message, run.message)

    @staticmethod
    @functools.cache
    def from_shell():
        """{script: a run of it as its own process}, for all tests that look at one."""
        return dict(zip(SCRIPTS, together(*((run, *item) for item in SCRIPTS.items()))))

    def test_learns(self):
        """Alone beside a text: the loss starts near ln(vocabulary) and falls, twice the same."""
        for script, settings in self.each():
            once = self.from_shell()[script]
            often, other = (execute(script, settings + more)
                            for more in (' --eval_interval=1', ' --seed=5'))
            self.assertEqual((once.code, once.err), (0, ''))
            printed = losses(often.out)
            curve = printed[-12:]  # from scratch, which may come after other stages
            self.assertEqual([step for step, *_ in curve], [*range(1, 13)])
            tokens = set(TEXT if script in TEXTUAL else '0123456789+=,')
            count = 300 if script == 'gpt2.py' else len(tokens)
            self.assertAlmostEqual(curve[0][1], math.log(count), delta=0.35)
            self.assertLess(curve[-1][2], curve[0][2] - 0.1)
            # evaluating more often changes nothing; another seed does
            self.assertEqual([line for line in printed if line[0] % 4 == 0], losses(once.out))
            self.assertNotEqual(losses(once.out), losses(other.out))
            if script in TEXTUAL:
                sample = often.out.split(LINE)[-1]
                self.assertEqual(len(sample), 41)
                self.assertLessEqual(set(sample), tokens)

    def test_bigram_finds_the_counts(self):
        """On input.txt training ends within 0.005 nats of what counting all pairs gives."""
        text = read('input.txt')
        out = execute('bigram.py', '--device=cpu', folder_with(text)).out
        n, chars = int(0.9 * len(text)), set(text)
        pairs = collections.Counter(zip(text[:n], text[1:n]))
        firsts = collections.Counter(text[:n - 1])
        counted = -sum(math.log((pairs[a, b] + 1) / (firsts[a] + len(chars)))
                       for a, b in zip(text[n:], text[n + 1:])) / (len(text) - n - 1)
        self.assertAlmostEqual(float(re.search(r'counting: +val loss (.*)', out)[1]), counted, 3)
        self.assertLess(abs(losses(out)[-1][2] - counted), 0.005)

    def test_notebook(self):
        """Pasted one after the other into one kernel: the same output as from the shell."""
        namespace = {}
        for script, settings in [*self.each(), *self.each()]:
            pasted = cell(script, settings, namespace, folder_with(TEXT))
            shell = self.from_shell()[script]
            self.assertEqual(without_seconds(pasted.out), without_seconds(shell.out))

    def test_bad_settings(self):
        wrong = run('bigram.py', '--sed=5')
        self.assertEqual((wrong.code, wrong.out), (1, ''))
        self.assertRegex(wrong.err, r'\A--sed=5: do you mean --seed=1337 \(int\)\?\n\Z')
        for script, settings in self.each():
            wrong = {'--max_itres=5': 'mean --max_iters=', '--max_iters=many': '(int)',
                     '--max_iters=1.5': '(int)', '--max_iters': '(int)', 'max_iters=1': 'mean --',
                     '--help': 'mean --', '--batch_size=0': 'batch_size=0',
                     '--device=cuda:9': 'device=cuda:9'}
            if script in TEXTUAL:
                wrong |= {'--prompt=a[': "'['", '--temperature=0': 'temperature=0.0'}
            if 'n_embd' in settings:
                wrong |= {'--n_head=3': 'n_head=3', '--learning_rate=no': '(float)',
                          '--dtype=int3': 'dtype=int3', '--on_gpu=True': 'mean --'}
                wrong |= {'addition_gpt.py': {
                    '--position=last': 'position=last', '--problem=12': 'it must look like 123+456',
                    '--problem=1+234': 'numbers of up to 2 digits', '--n_digits=0': 'n_digits=0',
                    '--chain_of_thought=True --position=abacus': 'needs position=learned',
                }, 'gpt.py': {
                    '--dropout=1': 'dropout=1', '--dropout=no': '(float)',
                    '--norm=pro': 'norm=pro', '--rung=1': 'rung=1', '--rung=13': 'rung=13',
                }, 'modern_gpt.py': {
                    '--n_kv_head=3': 'n_kv_head=3', '--n_kv_head=0': 'n_kv_head=0',
                    '--activation=tanh': 'activation=tanh', '--n_embd=6': 'n_embd=6',
                    '--linear_decay=2': 'linear_decay=2', '--half_until=-1': 'half_until=-1',
                    '--smear=-1': 'smear=-1',
                }, 'pretrain_finetune.py': {
                    '--megabytes=0': 'megabytes=0', '--lora_rank=-1': 'lora_rank=-1',
                    '--corpus=no.txt': "'no.txt'; it can also be", '--dropout=1': 'dropout=1',
                    '--pretrain_eval_interval=0': 'pretrain_eval_interval=0',
                }, 'gpt2.py': {
                    '--top_p=0': 'top_p=0', '--vocab_size=256': 'vocab_size=256', '--temperature=0':
                    'temperature=0', '--total_batch_size=200': 'processes = 128: 128 does',
                    '--world=2': 'mean --', '--hellaswag=1': '(bool)',
                }}[script]
                if script != 'gpt2.py':
                    wrong |= {'--resume=yes': '(bool)', '--resume=True': 'no.pt'}
                settings += ' --checkpoint=no.pt'
                if script == 'pretrain_finetune.py':
                    settings += ' --pretrain_checkpoint=no.pt'
            for setting, message in wrong.items():
                with self.subTest(setting):
                    self.one_line(execute(script, f'{settings} {setting}'), message)

    def test_bad_text(self):
        for script, settings in self.each(TEXTUAL):
            one = execute(script, settings, folder_with('a' * 500))  # odd, but no mistake
            self.assertIsNone(one.message)
            for text, message in (('', '0 characters'), ('to be', '5 characters'),
                                  ('Caf\xe9'.encode('latin-1') * 99, 'UTF-8')):
                self.one_line(execute(script, settings, folder_with(text)), message)
            fits = execute(script, settings, folder_with('to be or\r\n' * 4))
            self.assertIsNone(fits.message)

    def test_download(self):
        """No input.txt: it is fetched whole, or not at all, and a line says what to do."""
        good = TEXT.encode()
        digest = hashlib.sha256(good).hexdigest()[:16]
        bodies = {'/good': good, '/damaged': good[:-1] + b'?', '/short': good}

        def fetch(script, settings, address):
            def edit(source):
                self.assertIn('86c4e6aa9db7c042', source)
                source = source.replace('86c4e6aa9db7c042', digest)
                return re.sub(r"'https://raw[^']+'", f"'http://127.0.0.1:{address}'", source)
            return execute(script, settings, folder_with(None), edit)

        with Server(bodies, {'/short'}) as server:
            port = server.address[len('http://127.0.0.1:'):]
            for script, settings in self.each([*TEXTUAL, 'gpt2.py']):
                whole = fetch(script, settings, f'{port}/good')
                self.assertIsNone(whole.message)
                self.assertEqual((whole.folder / 'input.txt').read_bytes(), good)
                for address in f'{port}/damaged', f'{port}/short', f'{port}/missing', '1/refused':
                    failed = fetch(script, settings, address)
                    self.one_line(failed, address)
                    self.one_line(failed, 'into input.txt in this folder')
                    if script != 'gpt2.py' or 'short' not in address:  # it keeps what came
                        self.assertEqual(list(failed.folder.iterdir()), [])
                    self.assertFalse((failed.folder / 'input.txt').exists())


class Model(unittest.TestCase):
    """What the transformer of gpt.py computes, on the script's own functions."""

    def gpt(self, settings=''):
        """The names in gpt.py, run without training."""
        return execute('gpt.py', f'{GPT} --max_iters=0 {settings}').names

    def test_attention(self):
        """The written-out softmax equals F.scaled_dot_product_attention, for all lengths."""
        attention = self.gpt()['CausalSelfAttention']()
        for T in (16, 5, 1):
            x = torch.randn(3, T, 32)
            q, k, v = (z.view(3, T, 2, 16).transpose(1, 2)
                       for z in attention.c_attn(x).chunk(3, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            torch.testing.assert_close(attention(x), attention.c_proj(y.reshape(3, T, 32)))

    def test_causal(self):
        """Another later token changes no earlier logits, and does change its own."""
        for settings in '', '--norm=post', '--norm=none --residual=False --mlp_width=0':
            names = self.gpt(settings)
            model = names['model'].eval()
            idx = torch.randint(names['vocab_size'], (2, 16))
            other = idx.clone()
            other[:, 9] = (other[:, 9] + 1) % names['vocab_size']
            a, b = model(idx)[0], model(other)[0]
            self.assertTrue(torch.equal(a[:, :9], b[:, :9]))
            self.assertGreater((a[:, 9:] - b[:, 9:]).abs().amax(dim=2).min().item(), 0)

    def test_block(self):
        """The switches residual, norm and mlp_width build the block that they name."""
        x = torch.randn(2, 16, 32)
        formulas = {
            ('pre', True): lambda x, f, ln: x + f(ln(x)),
            ('post', True): lambda x, f, ln: ln(x + f(x)),
            ('none', True): lambda x, f, ln: x + f(x),
            ('none', False): lambda x, f, ln: f(x),
            ('pre', False): lambda x, f, ln: f(ln(x)),
            ('post', False): lambda x, f, ln: ln(f(x)),
        }
        for (norm, residual), formula in formulas.items():
            for width in 0, 1, 4:
                settings = f'--norm={norm} --residual={residual} --mlp_width={width}'
                block = self.gpt(settings)['Block']()
                y = formula(x, block.attn, block.ln_1)
                if width:
                    self.assertEqual(block.mlp.c_fc.out_features, 32 * width)
                    y = formula(y, block.mlp, block.ln_2)
                torch.testing.assert_close(block(x), y)

    def test_ladder(self):
        """Each rung trains and is what it says; what the command line sets outranks it."""
        few, parameters = '--device=cpu --max_iters=3 --eval_interval=3 --max_new_tokens=9', []
        for rung in range(2, 13):
            names = execute('gpt.py', f'--rung={rung} {few}').names
            parameters.append(sum(p.numel() for p in names['model'].parameters()))
            self.assertEqual(len(names['val_losses']), 1)
            switches = [names[name] for name in ('n_head', 'n_layer', 'mlp_width', 'residual')]
            self.assertEqual(switches, [1 if rung < 3 else 4, 1 if rung < 5 else 3,
                                        0 if rung < 4 else 1 if rung < 7 else 4, rung > 5])
            self.assertEqual(names['norm'], 'none' if rung < 8 else 'post' if rung < 9 else 'pre')
            self.assertEqual(names['dropout'] > 0, rung == 10)
        self.assertEqual(parameters, sorted(parameters))
        self.assertTrue(parameters[8] < 2.7e5 < parameters[9] < 3.3e5 < parameters[10], parameters)
        names = execute('gpt.py', f'--rung=9 --n_layer=1 --norm=post {few}').names
        self.assertEqual([names[name] for name in ('n_layer', 'norm', 'n_head')], [1, 'post', 4])

    def test_evaluation(self):
        """The mean over every character but the first, whatever the batch; chance is left alone."""
        names = self.gpt('--dropout=0.5')
        model, val, T = names['model'], names['val_data'], 16
        model.train()
        random = torch.get_rng_state()
        loss = names['evaluate']()
        self.assertTrue(torch.equal(random, torch.get_rng_state()))
        self.assertTrue(model.training)
        model.eval()
        with torch.no_grad():
            each = [F.cross_entropy(model(val[None, i:min(i + T, len(val) - 1)])[0][0],
                                    val[i + 1:i + T + 1], reduction='sum')
                    for i in range(0, len(val) - 1, T)]
        self.assertGreater((len(val) - 1) % T, 0)  # the last window is a short one
        self.assertAlmostEqual(loss, sum(each).item() / (len(val) - 1), places=5)
        self.assertEqual(loss, self.gpt('--dropout=0.5 --batch_size=3')['evaluate']())

    def test_sampling(self):
        """Past block_size; top_k and temperature as they should be; each token handed over."""
        names = self.gpt()
        model, idx, seen = names['model'].eval(), torch.zeros(2, 1, dtype=torch.long), []
        out = model.generate(idx, 40, top_k=1, on_token=seen.append)
        self.assertTrue(torch.equal(out, torch.cat([idx, *seen], dim=1)))
        for t in range(1, 41):  # greedy: each token is the likeliest one after the 16 before it
            likeliest = model(out[:, max(0, t - 16):t])[0][:, -1].argmax(dim=-1)
            self.assertTrue(torch.equal(out[:, t], likeliest))
        self.assertTrue(torch.equal(out, model.generate(idx, 40, temperature=1e-4)))
        chances = F.softmax(model(idx[:1])[0][0, -1] / 0.5, dim=-1)
        many = idx[:1].repeat(5000, 1)
        drawn = model.generate(many, 1, temperature=0.5)[:, 1]
        share = torch.bincount(drawn, minlength=names['vocab_size']) / 5000
        self.assertLess((share - chances).abs().max().item(), 0.03)
        three = model.generate(many, 1, temperature=0.5, top_k=3)[:, 1]
        self.assertEqual(set(three.tolist()), set(chances.topk(3).indices.tolist()))

    def test_number_types(self):
        """bfloat16 and float16 (with loss scaling) learn what float32 learns, nearly."""
        for script in 'gpt.py', 'modern_gpt.py':
            last = {}
            for dtype in 'float32', 'bfloat16', 'float16':
                trained = execute(script, f'{GPT} --dtype={dtype}')
                self.assertIn(f'{dtype}: as set', trained.out.split('\n')[0])
                last[dtype] = trained.names['losses'][-1]
                self.assertEqual(trained.names['scaler'].is_enabled(), dtype == 'float16')
            self.assertEqual(len(set(last.values())), 3)
            self.assertLess(max(last.values()) - min(last.values()), 0.02)


class Modern(unittest.TestCase):
    """What modern_gpt.py adds to gpt.py: each idea computes what its paper says."""

    def modern(self, settings=''):
        """The names in modern_gpt.py, run without training, all weights random."""
        settings = f'{GPT} --n_head=4 --qk_norm=True --max_iters=0 {settings}'
        names = execute('modern_gpt.py', settings).names
        for p in names['model'].parameters():
            nn.init.normal_(p, std=p.shape[-1]**-0.5)
        names['model'].eval()
        return names

    def test_is_gpt(self):
        """With every idea turned back: the losses of gpt.py, step by step, to the last bit."""
        for dtype in 'float32', 'bfloat16':
            settings = f"{SCRIPTS['gpt.py']} --dtype={dtype} --beta2=0.99"
            gpt = execute('gpt.py', settings).names
            modern = execute('modern_gpt.py', f'{settings} {AS_GPT}').names
            self.assertEqual(len(gpt['losses']), 12)
            for name in 'losses', 'val_losses':
                self.assertEqual(modern[name], gpt[name], dtype)
        # and each of them, alone, changes what is computed
        for setting in AS_GPT.replace('--kv_cache=False', '').split():
            name = setting[2:].split('=')[0]
            other = {'n_kv_head': '1', 'activation': 'swiglu', 'half_until': '0.5',
                     'linear_decay': '0.8', 'smear': '2', 'tied': 'False'}.get(name, 'True')
            with self.subTest(name):
                modern = execute('modern_gpt.py', f'{settings} {AS_GPT} --{name}={other}')
                if name == 'flash':  # another way to the same numbers
                    for a, b in zip(modern.names['losses'], gpt['losses']):
                        self.assertAlmostEqual(a, b, delta=0.02)
                self.assertNotEqual(modern.names['losses'], gpt['losses'])
                self.assertLess(modern.names['losses'][-1], modern.names['losses'][0])

    def test_cache(self):
        """The same logits with the cache as without, and the same text, past block_size, too."""
        for settings in ('', '--n_kv_head=1', '--n_kv_head=4 --flash=True', '--flash=True',
                         '--rotary=False --smear=0'):
            names = self.modern(settings)
            model, idx = names['model'], torch.randint(names['vocab_size'], (3, 16))
            whole, cache = model(idx)[0], names['Cache'](3)
            parts = [model.logits(idx[:, :5], cache)]
            parts += [model.logits(idx[:, :t], cache) for t in range(6, 17)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole)
            self.assertEqual(cache.length, 16)
            texts, lengths = [], []
            hook = model.h[0].register_forward_pre_hook(
                lambda _, args: lengths.append(args[0].shape[1]))
            for use in True, False:
                torch.manual_seed(1)
                texts.append(model.generate(idx[:, :3], 13, top_k=5, use_cache=use))
            hook.remove()
            self.assertTrue(torch.equal(*texts))
            self.assertEqual(lengths, [3] + 12 * [1] + [*range(3, 16)])  # that it had to read
            long = model.generate(idx, 30, top_k=1)  # a full cache goes on from its last half
            begin = 0
            for t in range(16, 46):
                begin = t - 8 if t - begin > 16 else begin
                likeliest = model(long[:, begin:t])[0][:, -1].argmax(dim=-1)
                self.assertTrue(torch.equal(long[:, t], likeliest), t)
            slid = model.generate(idx, 30, top_k=1, use_cache=False)
            likeliest = model(slid[:, 29:45])[0][:, -1].argmax(dim=-1)
            self.assertTrue(torch.equal(slid[:, 45], likeliest))
        samples = [execute('modern_gpt.py', f'{GPT} --kv_cache={use} --max_new_tokens=15').out
                   for use in (True, False)]
        self.assertIn('without the key/value cache', samples[0])
        self.assertEqual(*(sample.split(LINE)[1] for sample in samples))
        small, large = (self.modern(f'--n_kv_head={n}')['Cache'](1).kv.nbytes for n in (1, 4))
        self.assertEqual(4 * small, large)

    def test_attention(self):
        """Heads share keys as F.scaled_dot_product_attention has them do, whatever the length."""
        for n, settings in ((1, ''), (2, ''), (2, '--flash=True'), (4, '')):
            names = self.modern(f'--n_kv_head={n} --rotary=False --qk_norm=False {settings}')
            attention = names['model'].h[0].attn
            for T in 16, 5, 1:
                x = torch.randn(3, T, 32)
                q, k, v = (z.view(3, T, -1, 8).transpose(1, 2)
                           for z in attention.c_attn(x).split((32, 8 * n, 8 * n), dim=2))
                k, v = (z.repeat_interleave(4 // n, dim=1) for z in (k, v))
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
                torch.testing.assert_close(attention(x), attention.c_proj(y.reshape(3, T, 32)))

    def test_positions(self):
        """Rotary: channels i and i + head_size / 2 turn as one complex number; QK-norm before."""
        for norm in True, False:
            attention = self.modern(f'--n_kv_head=4 --qk_norm={norm}')['model'].h[0].attn
            x = torch.randn(2, 16, 32)
            q, k, v = (z.view(2, 16, 4, 8) for z in attention.c_attn(x).split(32, dim=2))
            turn = torch.exp(1j * torch.arange(16).view(16, 1, 1) * 10000**-(torch.arange(4) / 4))
            turned = []
            for z in q, k:
                if norm:
                    z = z - z.mean(dim=-1, keepdim=True)
                    z = z / (z.square().mean(dim=-1, keepdim=True) + 1e-5)**0.5
                z = torch.complex(z[..., :4], z[..., 4:]) * turn
                turned.append(torch.cat((z.real, z.imag), dim=-1).transpose(1, 2))
            y = F.scaled_dot_product_attention(*turned, v.transpose(1, 2), is_causal=True)
            y = attention.c_proj(y.transpose(1, 2).reshape(2, 16, 32))
            torch.testing.assert_close(attention(x), y)

    def test_layers(self):
        """The formulas of the MLPs, RMSNorm and the smear; SwiGLU has as many parameters."""
        x, sizes = torch.randn(2, 4, 32), set()
        formulas = {'relu': lambda h: h.clamp(min=0), 'relu2': lambda h: h.clamp(min=0)**2,
                    'gelu': lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
                    'quick_gelu': lambda h: h / (1 + torch.exp(-1.702 * h)),
                    'swiglu': lambda h: h[..., :88] / (1 + torch.exp(-h[..., :88])) * h[..., 88:]}
        for name, formula in formulas.items():
            mlp = self.modern(f'--activation={name}')['model'].h[0].mlp
            torch.testing.assert_close(mlp(x), formula(x @ mlp.c_fc.weight.T) @ mlp.c_proj.weight.T)
            sizes.add(sum(p.numel() for p in mlp.parameters()))
        self.assertLess(max(sizes), 1.05 * min(sizes))
        dropped = self.modern('--dropout=0.5')['model'].drop.train()(torch.ones(40, 16, 32))
        self.assertEqual(set(dropped.flatten().tolist()), {0, 2})
        self.assertTrue(torch.equal(dropped, dropped[:, :1].expand(-1, 16, -1)))
        self.assertAlmostEqual(dropped.mean().item(), 1, delta=0.15)
        norm = self.modern('--rms_norm=True')['make_norm']()
        y = x / x.square().mean(dim=-1, keepdim=True).sqrt()
        torch.testing.assert_close(norm(x), y, atol=1e-4, rtol=1e-4)
        names = self.modern()
        model, idx, seen = names['model'], torch.randint(names['vocab_size'], (2, 16)), []
        model.h[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(idx)
        x = model.wte(idx)
        for back, share in (1, model.smear[0]), (2, model.smear[1]), (3, model.smear[2]):
            x[:, back:] += share * model.wte(idx)[:, :-back]
        torch.testing.assert_close(seen[0], x)

    def test_causal(self):
        """Another later token changes no earlier logits, and does change its own."""
        for settings in '', '--flash=True --n_kv_head=1', '--rms_norm=True --rotary=False':
            names = self.modern(settings)
            idx = torch.randint(names['vocab_size'], (2, 16))
            other = idx.clone()
            other[:, 9] = (other[:, 9] + 1) % names['vocab_size']
            a, b = names['model'](idx)[0], names['model'](other)[0]
            torch.testing.assert_close(a[:, :9], b[:, :9])
            self.assertGreater((a[:, 9:] - b[:, 9:]).abs().amax(dim=2).min().item(), 1e-3)

    def test_optimizers(self):
        """Muon has the matrices of the blocks and a rate of its own, AdamW has all the rest."""
        names = execute('modern_gpt.py', f'{GPT} --muon_learning_rate=0.05').names
        optimizer, model = names['optimizer'], names['model']
        muon = {p for group in optimizer.parts[1].param_groups for p in group['params']}
        self.assertEqual(muon, {p for p in model.h.parameters() if p.dim() == 2})
        self.assertIsInstance(optimizer.parts[1], torch.optim.Muon)
        *rest, last = [group['lr'] for group in optimizer.param_groups]
        for lr in rest:
            self.assertAlmostEqual(lr * 0.05 / 0.01, last)
        self.assertAlmostEqual(last, 0.05 / (0.8 * 12))  # the last step of a straight line to 0
        start = execute('modern_gpt.py', f'{GPT} --max_iters=0').names['model']
        for (name, p), q in zip(model.named_parameters(), start.parameters()):
            self.assertGreater((p - q).abs().max().item(), 1e-4, name)  # each of them learned
            if name == 'lm_head.weight' or 'c_proj' in name:
                self.assertEqual(q.abs().max().item(), 0, name)  # from a start at zero
        optimizer.zero_grad()
        self.assertEqual({p.grad for p in model.parameters()}, {None})
        for parts in optimizer.parts[:1], [*optimizer.parts, optimizer.parts[1]]:
            with self.assertRaises(AssertionError):
                names['Optimizers'](*parts)

    def test_windows(self):
        """Windows start half as long and twice as many, so that a step sees as much text."""
        shapes = []
        def edit(source):
            line = '    logits, loss = train_model('
            self.assertIn(line, source)
            return source.replace(line, '    shapes.append(get_batch(window)[1].shape)\n' + line)
        execute('modern_gpt.py', GPT, None, edit, {'shapes': shapes})
        self.assertEqual(shapes, [(16, 8)] * 6 + [(8, 16)] * 6)

    def test_compile(self):
        """Where torch.compile cannot work a line says so, and training goes on without it."""
        def edit(source):
            self.assertIn('torch.compile(', source)
            return source.replace('torch.compile(', 'broken(')
        def broken(_):
            raise RuntimeError('no compiler\nis here')
        without = execute('modern_gpt.py', f'{GPT} --use_compile=True', None, edit,
                          {'broken': broken})
        self.assertIn('use_compile: not here, so without it (no compiler\n', without.out)
        self.assertEqual(losses(without.out), losses(execute('modern_gpt.py', GPT).out))


class Addition(unittest.TestCase):
    """What addition_gpt.py makes, masks, and counts."""
    SETTINGS = SCRIPTS['addition_gpt.py']

    def test_rows(self):
        """Problems and answers are those of Python's integers, in each way of writing them."""
        for settings, answer in (
                ('', lambda a, b, L: f'{a + b:0{L + 1}}'[::-1]),
                ('--reverse=False', lambda a, b, L: f'{a + b:0{L + 1}}'),
                ('--chain_of_thought=True', lambda a, b, L: ''.join(
                    f'{x}+{y}+{carry}={x + y + carry:02},' for i in range(L) for x, y, carry in [
                        (a // 10**i % 10, b // 10**i % 10, (a % 10**i + b % 10**i) // 10**i)]
                ) + f'{a + b:0{L + 1}}')):
            names = execute('addition_gpt.py', f'{self.SETTINGS} --max_iters=0 {settings}').names
            for L in 1, 2, 3, 20:
                problems = torch.randint(10, (30, 2, L))
                problems[0] = 9
                for (a, b), row, carry in zip(problems.tolist(), names['write'](problems),
                                              names['add'](*problems.unbind(1))[1]):
                    a, b = (int(''.join(map(str, digits))) for digits in (a, b))
                    text = f'{a:0{L}}+{b:0{L}}='
                    self.assertEqual(names['decode'](row), text + answer(a, b, L))
                    sums = [sum(int(z) for z in str(x)) for x in (a, b, a + b)]
                    self.assertEqual(9 * carry.sum(), sums[0] + sums[1] - sums[2])

    def test_batch(self):
        """The target is the next token of the answer, and none in a problem that is held out."""
        for n, lengths in ('2', [2]), ('5', [1, 2, 3, 4, 5]):
            settings = f'{self.SETTINGS} --max_iters=0 --batch_size=1000 --n_digits={n}'
            names = execute('addition_gpt.py', settings).names
            x, y = names['get_batch']()
            self.assertEqual(x.shape, (1000, 3 * int(n) + 2))
            seen, hidden = collections.Counter(), 0
            for row, target in zip(x, y):
                text = names['decode'](row)
                a, b = text.split('=')[0].split('+')
                L = len(a)
                seen[L] += 1
                self.assertEqual(len(b), L)
                if (int(a)**2 + int(b)**2) % 101 == 1:
                    hidden += 1
                    self.assertTrue((target == -1).all())
                else:
                    right = [int(z) for z in reversed(f'{int(a) + int(b):0{L + 1}}')]
                    self.assertEqual(target.tolist(), [-1] * (2 * L + 1) + right
                                     + [-1] * (3 * (int(n) - L)))
                    self.assertEqual(row[2 * L + 2:3 * L + 2].tolist(), right[:-1])
            self.assertEqual(seen, {L: 1000 // len(lengths) for L in lengths})
            self.assertTrue(1 < hidden < 40, hidden)
            for problems in names['val_problems']:  # and those are what it is judged by
                a, b = (problems * 10**torch.arange(problems.shape[2]).flip(0)).sum(2).unbind(1)
                self.assertTrue(((a**2 + b**2) % 101 == 1).all())

    def test_proof(self):
        """A model that is always right: 0 wrong of all. With one answer spoiled: 1 wrong."""
        class Oracle:
            def __init__(self, names, spoiled):
                self.names, self.spoiled = names, spoiled

            def __call__(self, idx):
                L = (idx[0] == 10).nonzero().item()
                numbers = torch.stack((idx[:, :L], idx[:, L + 1:2 * L + 1]), dim=1)
                rows = self.names['write'](numbers)[:, 1:idx.shape[1] + 1]
                for row, pair in zip(rows, numbers.flatten(1).tolist()):
                    if pair == self.spoiled and len(row) > 3 * L + 1: row[-1] = 7
                return F.one_hot(rows, 13).float(), None

            def generate(self, idx, count):
                return self.names['GPT'].generate(self, idx, count)

        for spoiled, lines in (
                (None, '2 digits: 0 wrong of 10,000\n'),
                ([4, 3, 5, 8], '2 digits: 1 wrong of 10,000\n'),  # 43**2 + 58**2: not held out
                ([0, 1, 0, 0], '0: 1 wrong of 34\n')):
            def edit(source):
                before = 'model.load_state_dict(best)\nmodel.eval()'
                self.assertIn(before, source)
                return source.replace(before, 'model = Oracle(globals(), spoiled)')
            out = execute('addition_gpt.py', f'{self.SETTINGS} --max_iters=0', None, edit,
                          {'Oracle': Oracle, 'spoiled': spoiled}).out
            self.assertIn(lines, out)
            self.assertEqual(out.count('(wrong, it is '), 0 if spoiled is None else 1, out)
            self.assertEqual('its first mistakes:' in out, spoiled is not None)
        self.assertIn('1+0=701  (wrong, it is 1)', out)

    def test_check(self):
        """One pass finds right what greedy decoding gets right; training leads to 0 wrong."""
        for settings in '', '--chain_of_thought=True', '--n_digits=4 --position=abacus':
            names = execute('addition_gpt.py', f'{self.SETTINGS} {settings} --max_iters=60').names
            names['model'].eval()
            for L in names['lengths']:
                problems = torch.cat([torch.randint(10, (300, 2, L)), torch.zeros(1, 2, L).long()])
                rows = names['write'](problems)
                out = names['model'].generate(rows[:, :2 * L + 2], rows.shape[1] - 2 * L - 2)
                right = (out == rows).all(dim=1)
                self.assertEqual(names['check'](problems)[0].tolist(), right.tolist())
        self.assertIn('2 digits: 0 wrong of 10,000\n', execute(
            'addition_gpt.py', '--device=cpu --n_digits=2 --max_iters=600').out)

    def test_abacus(self):
        """Places count from the number's end; in training a row's are moved, all alike."""
        for reverse, end in ('True', [1, 2, 3]), ('False', [3, 2, 1]):
            settings = f'{self.SETTINGS} --n_digits=4 --test_digits=7 --position=abacus'
            names = execute('addition_gpt.py', f'{settings} --reverse={reverse}').names
            wpe = names['model'].wpe.eval()
            table = F.linear(wpe.waves, wpe.weight)  # (places, n_embd)
            self.assertEqual(len(table), 9)
            rows = torch.tensor([names['encode'](row) for row in ('12+34=640', '99+99=891')])
            places = torch.tensor([2, 1, 3, 2, 1, 0, *end])  # of 1, 2, +, 3, 4, =, 6, 4, 0
            torch.testing.assert_close(wpe(rows), table[places].expand(2, -1, -1))
            wpe.train()
            moved = set()
            for _ in range(40):
                for row in wpe(rows):
                    fits = [by for by in range(9) if torch.allclose(row, table[(places + by) % 9])]
                    self.assertEqual(len(fits), 1)
                    moved.add(fits[0])
            self.assertEqual(moved, set(range(9)))

    def test_problem(self):
        """The answer to a problem, and whether it is right, also for a chain of thought."""
        chain, longer = '--chain_of_thought=True ', '--n_digits=4 --test_digits=6'
        for settings in '', chain, longer, chain + longer:
            folder = execute('addition_gpt.py', f'{self.SETTINGS} {settings}',
                             folder_with(None)).folder  # it needs no text, and leaves none
            self.assertEqual([file.name for file in folder.iterdir()], ['addition_gpt.pt'])
            for a, b in (12, 34), (7, 5), (0, 0):
                out = execute('addition_gpt.py', f'{self.SETTINGS} {settings} --resume=True '
                              f'--max_iters=0 --problem={a}+{b}', folder).out.split(LINE)[1]
                said, verdict = re.search(rf'^{a}\+{b}=(.+?)  \((.*)\)', out).groups()
                right = 'right' if said == str(a + b) else f'wrong, it is {a + b}'
                self.assertEqual(verdict, right)
                L = len(str(max(a, b))) if longer in settings else 2  # columns
                self.assertEqual(out.count('\n'), 1 + L if chain in settings else 1)


class Pretraining(unittest.TestCase):
    """The corpus, the three stages and LoRA of pretrain_finetune.py."""
    NONE = '--max_iters=0 --pretrain_max_iters=0 '  # no training, just the names

    def pretrain(self, more='', folder=None, edit=str):
        settings = f'{SCRIPTS["pretrain_finetune.py"]} {more}'
        return execute('pretrain_finetune.py', settings, folder, edit)

    def table(self, out):
        """{stage: [loss on the corpus, loss on input.txt, best step, seconds, parameters, MiB]}"""
        rows = re.findall(r'^(\w+) +(\d\.\d{4} .*) MiB$', out, re.M)
        return {stage: [float(cell) for cell in re.findall(r'[\d.]+', row.replace(',', ''))]
                for stage, row in rows}

    def test_characters(self):
        """The corpus comes in the characters of input.txt; what is like none is dropped."""
        folder = folder_with('"to be" - or not \'tis o\n' * 30)
        names = self.pretrain(self.NONE, folder).names
        for text, like, gone in (
                ('“to” „be”—or nót\u00a0‘tis’\ttob’s☃∑', '"to" "be"-or not \'tis\' tob\'s',
                 2),
                ('ﬆ–10…\r\n', 'st-\n', 3), ('to be\n', 'to be\n', 0)):
            file = folder / 'odd.txt'
            file.write_bytes(text.encode() * 90000)  # more than one piece
            ids, lost = names['load'](file)
            self.assertEqual(names['decode'](ids.tolist()), like * 90000)
            self.assertAlmostEqual(lost, gone / len(text.replace('\r', '')), 6)
        file.write_text('to be\n' * 400000)
        names['megabytes'] = 1
        self.assertEqual(len(names['load'](file)[0]), 2**20)  # the pieces that make a megabyte
        many = ''.join(map(chr, range(0x4e00, 0x4e00 + 300))) * 9  # ids above 255
        names = self.pretrain(self.NONE + '--corpus=input.txt', folder_with(many)).names
        held = names['texts']['corpus'][1].tolist()
        self.assertEqual(names['decode'](names['corpus_data'].tolist()), many)
        self.assertEqual(names['decode'](held), many[-len(held):])

    def test_shard(self):
        """A made shard of FineWeb becomes its text, once; a damaged one gets a line."""
        text = 'The king sees – naïve – cats.\n' * 40000
        tokens = [50256, *text.encode()]  # of a vocabulary of bytes

        def shard(magic, tokens, count):
            header = torch.tensor([magic, 1, count, *[0] * 253], dtype=torch.int32)
            return bytes(header.numpy()) + bytes(torch.tensor(tokens).to(torch.uint16).numpy())

        whole = shard(20240520, tokens, len(tokens))
        bodies = {'/good.bin': whole, '/cut.bin': whole[:90000], '/empty.bin': b'',
                  '/magic.bin': shard(7, tokens, 9), '/minus.bin': shard(20240520, tokens, -5),
                  '/tokens.bin': shard(20240520, [*tokens[:500], 60000], 501),
                  '/good.txt': text.encode(), '/latin.txt': 'Caf\xe9'.encode('latin-1') * 99}

        bodies |= {'/broken.bin': whole, '/broken.txt': text.encode()}
        ranks = {bytes([i]): i for i in range(256)}
        vocabulary = tiktoken.Encoding('bytes', pat_str='.', mergeable_ranks=ranks,
                                       special_tokens={'<|endoftext|>': 50256})

        def fetch(address, folder, corpus='fineweb', error=None):
            def edit(source):
                return re.sub("\nshard = '.*'", f"\nshard = '{address}'", source)
            with mock.patch('tiktoken.get_encoding', return_value=vocabulary, side_effect=error):
                return self.pretrain('--max_iters=1 --pretrain_max_iters=1 --megabytes=1 '
                                     f'--compare=False --corpus={corpus}', folder, edit)

        with Server(bodies, {'/broken.bin', '/broken.txt'}) as server:
            base = server.address
            good = folder_with(TEXT)
            for _ in range(2):  # the second time the file is there
                self.assertIsNone(fetch(base + '/good.bin', good).message)
            self.assertEqual(server.asked, [('/good.bin', 'bytes=0-501023')])
            kept = (good / 'fineweb-1MB.txt').read_text(encoding='utf-8')
            self.assertEqual(kept, '\n\n' + text.encode()[:249999].decode(errors='ignore'))
            for path, message in (('/cut.bin', 'bytes are missing'), ('/broken.bin', 'are missing'),
                                  ('/magic.bin', 'no shard'), ('/minus.bin', 'no shard'),
                                  ('/empty.bin', 'no shard'), ('/tokens.bin', 'GPT-2 has not')):
                folder = folder_with(TEXT)
                failed = fetch(base + path, folder)
                self.assertRegex(failed.message, rf'\Acorpus=fineweb: .*{message}.*\Z')
                self.assertEqual([file.name for file in folder.iterdir()], ['input.txt'])
            book = folder_with(TEXT)
            self.assertIsNone(fetch('', book, base + '/good.txt').message)
            kept = next(book.glob('corpus-*.txt')).read_bytes().decode()
            self.assertEqual(kept, text.encode()[:10**6].decode(errors='ignore'))
            for path, message in (('/broken.txt', 'bytes are missing'), ('/latin.txt', 'utf-8'),
                                  ('/none.txt', '404')):
                folder = folder_with(TEXT)
                self.assertIn(message, fetch('', folder, base + path).message)
                self.assertEqual([file.name for file in folder.iterdir()], ['input.txt'])
        for error in None, OSError('no vocabulary'):  # and nobody answers at that address now
            folder = folder_with(TEXT)
            (folder / 'docstrings.txt').write_text(text, encoding='utf-8')
            offline = fetch(base + '/good.bin', folder, error=error)
            self.assertIsNone(offline.message)
            self.assertRegex(offline.out, r'that failed \(\w+\), so it is to be docstrings.txt')

    def test_docstrings(self):
        """They are gathered from modules, classes and functions, but from no tests."""
        root = folder_with(None)
        for folder in 'a', 'tests', 'site-packages':
            (root / folder).mkdir()
            (root / folder / 'b.py').write_text(f'def f():\n    """In {folder}."""\n')
        (root / 'c.py').write_text('"""Module."""\nx = 1\nclass C:\n    """Class."""\n'
                                   '    def g(self):\n        """Method."""\n')
        (root / 'd.py').write_text('"""Broken."""\nx = (\n')
        names = self.pretrain(self.NONE).names
        with (mock.patch('sysconfig.get_path', return_value=str(root)),
              mock.patch('importlib.util.find_spec', return_value=None)):
            found = list(names['docstrings']())
        self.assertEqual(found, ['Module.\n\n', 'Class.\n\n', 'Method.\n\n', 'In a.\n\n'])

    def test_stages(self):
        """The table and the verdict say what the weights do; a second run uses what is there."""
        settings = '--dropout=0.1 --finetune_learning_rate=0.01 --pretrain_max_iters=30'
        first = self.pretrain(settings)
        rows = self.table(first.out)
        self.assertEqual([*rows], ['pretrain', 'finetune', 'scratch'])
        for stage, file in (('pretrain', 'pretrained_gpt.pt'), ('finetune', 'finetuned_gpt.pt'),
                            ('scratch', 'scratch_gpt.pt')):
            saved = torch.load(first.folder / file, weights_only=True)
            first.names['model'].load_state_dict(saved['best'])
            for column, (_, first.names['val_data']) in enumerate(first.names['texts'].values()):
                self.assertAlmostEqual(first.names['evaluate'](), rows[stage][column], delta=6e-5)
            (loss, step), own = min(saved['val_losses']), 0 if stage == 'pretrain' else 1
            self.assertAlmostEqual(loss, rows[stage][own], delta=6e-5)
            self.assertEqual(step, rows[stage][2])
        gain = rows['scratch'][1] - rows['finetune'][1]
        self.assertGreater(gain, 0)
        verdict = re.search(r'from scratch, the loss is lower by (\S+) nats\n', first.out)
        self.assertAlmostEqual(float(verdict[1]), gain, delta=2e-4)
        self.assertLess(rows['finetune'][1], rows['pretrain'][1] - 0.05)
        # the same again from the pretrained weights that are there
        before = (first.folder / 'pretrained_gpt.pt').read_bytes()
        second = self.pretrain(f'{settings} --pretrain_max_iters=50 --compare=False', first.folder)
        self.assertIn('step 30 and used as it is', second.out)
        self.assertEqual(losses(second.out), losses(first.out)[-6:-3])
        self.assertEqual((first.folder / 'pretrained_gpt.pt').read_bytes(), before)
        self.assertNotIn('scratch', second.out)
        self.assertEqual(second.out.split(LINE)[1:], first.out.split(LINE)[1:])
        for more, message in (('--n_layer=3', 'made with n_layer=2; --reuse=False makes it anew'),
                              ('--corpus=input.txt', f"corpus='{CORPUS}'"[:60]),
                              ('--resume=True --pretrain_max_iters=40', 'made with pretrained=')):
            self.assertIn(message, self.pretrain(more, first.folder).message)
        (first.folder / 'pretrained_gpt.pt').write_bytes(before[:-999])
        self.assertIn('resume from pretrained_gpt.pt', self.pretrain('', first.folder).message)
        anew = self.pretrain(f'--reuse=False {settings}', first.folder)
        self.assertEqual(losses(anew.out), losses(first.out))
        # dropout is for the small text; of fine-tuning the best weights are kept, not the last
        other = folder_with('to be or not ' * 400 + 'KING' * 150)
        fallen = self.pretrain('--finetune_learning_rate=0.01', other)
        again = self.pretrain('--reuse=False --dropout=0.5 --compare=False', other)
        self.assertEqual(losses(again.out)[:3], losses(fallen.out)[:3])
        self.assertNotEqual(losses(again.out)[3:], losses(fallen.out)[3:6])
        (best, step), last = min((loss, step) for step, _, loss in losses(fallen.out)[3:6]), 12
        self.assertLess(step, last)
        self.assertAlmostEqual(self.table(fallen.out)['finetune'][1], best, delta=1e-4)

    def test_lora(self):
        """At first it changes nothing; merged it computes the same; only A and B are learned."""
        names = self.pretrain(self.NONE + '--lora_rank=4').names
        plain, tuned = names['GPT']().eval(), names['GPT']().eval()
        tuned.load_state_dict(plain.state_dict())
        layers = [layer for layer in tuned.modules() if isinstance(layer, names['Linear'])]
        self.assertEqual(len(layers), 8)  # four in each block
        for layer in layers:
            layer.add_lora()
        idx = torch.randint(names['vocab_size'], (2, 16))
        self.assertTrue(torch.equal(plain(idx)[0], tuned(idx)[0]))
        for layer in layers:
            nn.init.normal_(layer.lora_B, std=0.5)
        self.assertGreater((plain(idx)[0] - tuned(idx)[0]).abs().max().item(), 0.1)
        weights = tuned.state_dict()
        before = {name: t.clone() for name, t in weights.items()}
        plain.load_state_dict(names['merged'](weights))
        torch.testing.assert_close(plain(idx)[0], tuned(idx)[0], atol=1e-5, rtol=0)
        for name, t in weights.items():  # merging copies
            self.assertTrue(torch.equal(t, before[name]), name)
        # with steps of next to nothing, fine-tuning ends where it begins: at the pretrained loss
        still = self.pretrain('--lora_rank=4 --lora_learning_rate=1e-30 --compare=False')
        rows = self.table(still.out)
        self.assertEqual(rows['finetune'][:2], rows['pretrain'][:2])
        before, after = still.out.split(LINE)[1:]  # and the samples have the same draws
        self.assertEqual(before.split('finetune ends')[0], after)
        run = self.pretrain('--lora_rank=2 --lora_learning_rate=0.02 --compare=False', still.folder)
        rows, few = self.table(run.out), 2 * 2 * (4 + 2 + 5 + 5) * 32
        self.assertEqual(rows['finetune'][4], few)
        total = int(rows['pretrain'][4]) + few
        self.assertIn(f'{few:,} of {total:,} parameters ({few / total:.1%}) learn', run.out)
        self.assertLess(rows['finetune'][1], rows['pretrain'][1] - 0.01)
        a, b = (torch.load(run.folder / f'{name}_gpt.pt', weights_only=True)
                for name in ('pretrained', 'finetuned'))
        changed = {name for name, t in a['best'].items() if not torch.equal(t, b['best'][name])}
        self.assertEqual(changed, {name for name in a['best'] if '.c_' in name})
        state = b['optimizer']['state'].values()
        self.assertEqual(sum(s['exp_avg'].numel() for s in state), few)
        memory = sum(t.nbytes for s in state for t in s.values()) / 2**20
        self.assertAlmostEqual(rows['finetune'][5], memory, delta=0.006)


class Gpt2(unittest.TestCase):
    """The model, vocabulary, files and training of gpt2.py."""
    SIZES = dict(block_size=16, vocab_size=101, n_layer=3, n_head=4, n_embd=32)

    @classmethod
    def setUpClass(cls):
        """Its names, as after an import, which prints nothing and trains nothing."""
        cls.names = {'__name__': 'gpt2', '__file__': 'gpt2.py'}
        out = io.StringIO()
        with contextlib.redirect_stdout(out), mock.patch('sys.argv', ['other.py', '--no=5']):
            exec(compile(read('gpt2.py'), 'gpt2.py', 'exec'), cls.names)
        assert out.getvalue() == '' and 'optimizer' not in cls.names

    def gpt(self, **sizes):
        torch.manual_seed(1)
        model = self.names['GPT'](self.names['GPTConfig'](**self.SIZES | sizes)).eval()
        for p in model.parameters():  # biases and gains other than those of the start
            nn.init.normal_(p, std=0.3)
        return model

    def script(self, more='', folder=None, edit=str):
        return execute('gpt2.py', f'{SCRIPTS["gpt2.py"]} {more}', folder, edit)

    def test_model(self):
        """As nn.TransformerEncoderLayer computes it; causal; 124,439,808 parameters by default."""
        model, C = self.gpt(), 32
        idx = torch.randint(101, (2, 16))
        x = model.wte(idx) + model.wpe.weight
        for block in model.h:
            layer = nn.TransformerEncoderLayer(C, 4, 4 * C, 0.0, batch_first=True, norm_first=True,
                                               activation=lambda x: F.gelu(x, approximate='tanh'))
            theirs = (layer.norm1, layer.self_attn.out_proj, layer.norm2, layer.linear1,
                      layer.linear2)
            ours = (block.ln_1, block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj)
            for a, b in zip(theirs, ours):
                a.load_state_dict(b.state_dict())
            layer.self_attn.in_proj_weight.data = block.attn.c_attn.weight.data
            layer.self_attn.in_proj_bias.data = block.attn.c_attn.bias.data
            x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(16))
        logits, loss = model(idx, idx)
        torch.testing.assert_close(logits, model.ln_f(x) @ model.wte.weight.T, atol=1e-4, rtol=1e-4)
        self.assertAlmostEqual(loss.item(), F.cross_entropy(logits.view(-1, 101),
                                                            idx.view(-1)).item(), 5)
        with torch.device('meta'):
            model = self.names['GPT'](self.names['GPTConfig']())
        self.assertEqual(sum(p.numel() for p in model.parameters()), 124_439_808)
        fresh = self.names['GPT'](self.names['GPTConfig'](n_layer=8, n_embd=96, vocab_size=500))
        self.assertAlmostEqual(fresh.h[3].attn.c_attn.weight.std().item(), 0.02, 3)
        self.assertAlmostEqual(fresh.h[3].mlp.c_proj.weight.std().item(), 0.005, 3)
        self.assertEqual(fresh.h[3].mlp.c_fc.bias.abs().max(), 0)

    def test_generate(self):
        """The cache changes no text, also beyond a full window; top_k, top_p and stop do theirs."""
        model, seen = self.gpt(), []
        idx = torch.randint(101, (3, 5))
        scores = []
        hook = model.lm_head.register_forward_hook(lambda module, x, y: scores.append(y))
        text = model.generate(idx, 30, on_token=lambda x: seen.append(x))
        hook.remove()
        self.assertTrue(torch.equal(torch.cat(seen, dim=1), text[:, 5:]))
        window = 5
        for i in range(5, 35):
            torch.testing.assert_close(scores[i - 5], model(text[:, i - window:i])[0][:, -1])
            window = 8 if window == 16 else window + 1  # a full one starts again with its half
        greedy = model.generate(idx, 1, top_k=1)[:, -1]
        self.assertTrue(torch.equal(greedy, model(idx)[0][:, -1].argmax(dim=1)))
        text = model.generate(idx, 30, top_k=1)
        with torch.no_grad():
            chance = F.softmax(model(idx[:1])[0][0, -1] / 0.9, dim=0)
        order = chance.argsort(descending=True).tolist()
        few = next(n for n in range(1, 102) if chance[order[:n]].sum() >= 0.5)
        drawn = lambda **how: set(model.generate(idx[:1].repeat(2000, 1), 1, 0.9, **how)[:, -1]
                                  .tolist())
        self.assertEqual(drawn(top_k=3), set(order[:3]))
        self.assertLessEqual(drawn(top_p=0.5), set(order[:few]))
        self.assertIn(order[few - 1], drawn(top_p=0.5))
        self.assertGreater(len(drawn()), few)
        stop = text[0, 9].item()
        ended = model.generate(idx[:1], 30, top_k=1, stop=stop)
        self.assertEqual(ended[0].tolist(), text[0, :text[0].tolist().index(stop, 5) + 1].tolist())
        torch.manual_seed(3)
        text = model.generate(idx, 30)
        torch.manual_seed(3)
        stop = text[0, 9].item()  # the other rows go on
        for row, whole in zip(model.generate(idx, 30, stop=stop).tolist(), text.tolist()):
            known = whole.index(stop, 5) + 1 if stop in whole[5:] else 35
            self.assertEqual(row, (whole[:known] + [stop] * 35)[:len(row)])

    def test_files(self):
        """Weights come back as they were, in all kinds of numbers; a wrong file is named."""
        model, GPT, folder = self.gpt(n_embd=64, n_head=2), self.names['GPT'], folder_with(None)
        model.save_pretrained(str(folder))
        file = folder / 'model.safetensors'
        whole = file.read_bytes()
        again = GPT.from_pretrained(str(folder))
        self.assertEqual(again.config, model.config)
        for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters()):
            self.assertTrue(torch.equal(p, q), name)
        self.assertIs(again.lm_head.weight, again.wte.weight)
        length = int.from_bytes(whole[:8], 'little')
        header, data = json.loads(whole[8:8 + length]), whole[8 + length:]
        self.assertEqual(header['h.0.mlp.c_fc.weight']['shape'], [64, 256])
        begin, end = header['h.0.mlp.c_fc.weight']['data_offsets']
        stored = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float32).view(64, 256)
        self.assertTrue(torch.equal(stored.t(), model.h[0].mlp.c_fc.weight))

        def write(header, data):
            head = json.dumps(header).encode()
            file.write_bytes(len(head).to_bytes(8, 'little') + head + data)

        for kind, dtype in (('F32', torch.float32), ('F16', torch.float16),
                            ('BF16', torch.bfloat16)):
            mask = dict(dtype='U8', shape=[1], data_offsets=[0, 1])
            other, parts, size = {'h.0.attn.bias': mask}, [b'\1'], 1
            for name, info in header.items():
                if name != '__metadata__':
                    begin, end = info['data_offsets']
                    part = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float32)
                    parts.append(part.to(dtype).view(torch.uint8).numpy().tobytes())
                    other['transformer.' + name] = dict(info, dtype=kind, data_offsets=[
                        size, size := size + len(parts[-1])])
            write(other, b''.join(parts))
            loaded = GPT.from_pretrained(str(file))
            self.assertTrue(torch.equal(loaded.wpe.weight, model.wpe.weight.to(dtype).float()))
            self.assertTrue(torch.equal(loaded.h[2].attn.c_attn.weight,
                                        model.h[2].attn.c_attn.weight.to(dtype).float()))
        lacks = {name: info for name, info in header.items() if name != 'h.1.ln_2.bias'}
        more = header | {'h.7.ln_2.bias': header['h.1.ln_2.bias']}
        shape = header | {'ln_f.bias': dict(header['ln_f.bias'], shape=[2, 32])}
        kind = header | {'ln_f.bias': dict(header['ln_f.bias'], dtype='I64')}
        for wrong, message in ((lacks, 'h.1.ln_2.bias is missing'), (shape, 'ln_f.bias is of '),
                               (more, 'h.7.ln_2.bias is too much'), (kind, 'of type I64')):
            write(wrong, data)
            with self.assertRaisesRegex(ValueError, message):
                GPT.from_pretrained(str(folder))
        for damaged, message in ((whole[:-100], '100 bytes too short'), (b'', 'damaged'),
                                 (b'hello, this is text', 'damaged')):
            file.write_bytes(damaged)
            with self.assertRaisesRegex(ValueError, message):
                GPT.from_pretrained(str(folder))
        bad = self.script(f'--init_from={folder}')
        self.assertRegex(bad.message, r'\Ainit_from=.*damaged.*\Z')

    def test_vocabulary(self):
        """Merges are those of a naive trainer; any text comes back from its tokens."""
        text = TEXT + 'naïve – ½ ²3 don\'t  \n\n x_y ' * 9
        words = [list(word.encode()) for word in self.names['split'](text)]
        self.assertEqual(b''.join(map(bytes, words)).decode(), text)
        tokens = [bytes([i]) for i in range(256)]
        while len(tokens) < 300:
            pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            for word in words:
                i = 0
                while i < len(word) - 1:
                    if (word[i], word[i + 1]) == best:
                        word[i:i + 2] = [len(tokens)]
                    i += 1
            tokens.append(tokens[best[0]] + tokens[best[1]])
        self.assertEqual(self.names['learn_bpe'](text, 300), tokens)
        self.assertEqual(self.names['learn_bpe']('ab cd', 300), tokens[:256])  # nothing repeats
        encoding = self.names['vocabulary'](tokens)
        self.assertEqual(encoding.n_vocab, 301)
        ids = encoding.encode_ordinary(text)
        self.assertLess(len(ids), len(text) / 2)
        flat = [token for word in words for token in word]
        self.assertLess(sum(a != b for a, b in zip(ids[:500], flat)), 1)
        for s in text, '', '日本語 🎉\x00\r\n\t  ', "don't  ½²③", ''.join(map(chr, range(3000))):
            self.assertEqual(encoding.decode(encoding.encode_ordinary(s)), s)
        with mock.patch('tiktoken.get_encoding', side_effect=OSError), \
                self.assertRaisesRegex(SystemExit, 'TIKTOKEN_CACHE_DIR'):
            self.names['vocabulary']()

    def test_fetch(self):
        """What breaks off is gone on from; only a whole file gets its name."""
        body, folder, fetch = os.urandom(5_000_000), folder_with(None), self.names['fetch']
        path = str(folder / 'new' / 'file')
        broken = {'/file'}
        with Server({'/file': body}, broken) as server, contextlib.redirect_stdout(io.StringIO()):
            for _ in range(2):
                with self.assertRaisesRegex(OSError, 'run it again'):
                    fetch(server.address + '/file', path)
                self.assertFalse(os.path.exists(path))
            broken.clear()
            fetch(server.address + '/file', path)
            self.assertEqual(pathlib.Path(path).read_bytes(), body)
            starts = [int(wanted[6:-1]) for _, wanted in server.asked]
            self.assertEqual(starts[0], 0)
            self.assertTrue(3_000_000 < starts[1] < starts[2] < 5_000_000, starts)
            fetch(server.address + '/file', path)  # it is there
            self.assertEqual(len(server.asked), 3)
            os.rename(path, path + '.part')  # killed just before it got its name
            fetch(server.address + '/file', path)
            self.assertEqual(pathlib.Path(path).read_bytes(), body)
            with self.assertRaises(OSError):
                fetch(server.address + '/none', path + '2')
            with self.assertRaisesRegex(OSError, 'damaged'):
                fetch(server.address + '/file', path + '3', '0' * 16)
        os.rename(path, path + '.part')
        with Server({'/file': body}, ranges=False) as server, \
                contextlib.redirect_stdout(io.StringIO()):
            fetch(server.address + '/file', path)
        self.assertEqual(pathlib.Path(path).read_bytes(), body)

    def test_web_text(self):
        """Shards of tokens are downloaded, checked, and learned from; damaged ones get a line."""
        tokens = torch.arange(3000).remainder(97).to(torch.uint16).numpy()
        good = np.array([20240520, 1, 3000] + [0] * 253, '<i4').tobytes() + tokens.tobytes()
        names = [f'/{name}.bin' for name in ('val_000000', 'train_000001', 'train_000002')]
        pairs = [bytes([i]) for i in range(256)] + [bytes(divmod(i, 256)) for i in range(50000)]
        small = tiktoken.Encoding('pairs', pat_str='.', special_tokens={'<|endoftext|>': 50256},
                                  mergeable_ranks={pair: i for i, pair in enumerate(pairs)})

        def learn(bodies, folder):
            with Server(bodies) as server, mock.patch('tiktoken.get_encoding', return_value=small):
                edit = lambda source: re.sub(r"hub \+ '/datasets/kjj0/\w+-gpt2/resolve/main/\w+_{}",
                                             f"'{server.address}/{{}}", source)
                return self.script('--dataset=fineweb --n_shards=2 --n_embd=8 --max_iters=2 '
                                   f'--cache_dir={folder}/c --batch_size=4', folder, edit)

        folder = folder_with(None)
        run = learn(dict.fromkeys(names, good), folder)
        self.assertIsNone(run.message)
        self.assertIn('fineweb: 6,000 tokens to learn from, 3,000 to be judged on', run.out)
        windows = run.names['get_windows'](3)
        self.assertEqual(windows.shape, (8, 17))
        self.assertTrue((windows.diff(dim=1).remainder(97) == 1).all())
        self.assertFalse(torch.equal(windows, run.names['get_windows'](4)))
        for bad in (good[:-2], b'', bytes(1024) + good[1024:]):
            failed = learn(dict.fromkeys(names, good) | {names[1]: bad}, folder_with(None))
            self.assertRegex(failed.message, r'\Ainit_from=.*_000001.bin is no whole shard.*\Z')
        self.assertIn('404', learn({}, folder_with(None)).message)
        with mock.patch('tiktoken.get_encoding', return_value=small):
            own = self.script(f'--dataset={folder}/c/fineweb --n_embd=8 --max_iters=1')
        self.assertIsNone(own.message)
        self.assertIn('6,000 tokens to learn from', own.out)

    def test_text(self):
        """The last tenth of a text is judged on; its bits per byte are those of its bytes."""
        run = self.script('--eval_tokens=150')
        names = run.names
        encoding, val = names['encoding'], names['val_shard'].tolist()
        text = encoding.decode(names['train_shards'][0].tolist()) + encoding.decode(val)
        self.assertEqual(text, TEXT)
        self.assertEqual(len(encoding.decode_bytes(val)), len(TEXT.encode())
                         - next(i for i in range(int(0.9 * len(TEXT.encode())), 10**6)
                                if TEXT.encode()[i] >> 6 != 2))
        saved = checkpoint(run.folder)
        model = names['GPT'](names['config']).eval()
        model.load_state_dict(saved['best'])
        total = 0.0
        for i in range(0, 150, 16):
            x, y = val[i:min(i + 16, 150)], val[i + 1:min(i + 17, 151)]
            loss = F.cross_entropy(model(torch.tensor([x]))[0][0], torch.tensor(y))
            total += loss.item() * len(y)
        self.assertAlmostEqual(min(saved['val_losses'])[0], total / 150, 5)
        bits = total / math.log(2) / len(encoding.decode_bytes(val[1:151]))
        self.assertIn(f'{bits:.4f} bits per byte', run.out)
        # larger than a piece: no word is lost between them
        file = folder_with(None) / 'large.txt'
        file.write_text('The naïve – cat.\n' * 150000 + 'é' * 600000, encoding='utf-8')
        middle, size = names['middle'](file)
        self.assertEqual({piece[-1] for piece in names['pieces'](file, 0, 2_500_000)},
                         {'\n'})
        self.assertEqual(''.join([*names['pieces'](file, 0, middle), *names['pieces'](
            file, middle, size)]), file.read_text(encoding='utf-8'))
        for count in range(10, 20):
            file.write_text('☃' * count, encoding='utf-8')
            file.read_bytes()[names['middle'](file)[0]:].decode()
        end = encoding.eot_token
        names['val_shard'] = np.array([9, end, 9, 9, end])  # which is no byte of the text
        self.assertAlmostEqual(names['bits_per_byte'](1.0), 4 / math.log(2) / 2)
        for bad, message in ((b'', 'dataset=input.txt: '), (b'to be', 'dataset=input.txt: '),
                             ('Caf\xe9'.encode('latin-1') * 99, 'utf-8')):
            failed = self.script('', folder_with(bad))
            self.assertIn(message, failed.message)
            self.assertNotIn('\n', failed.message)

    def test_processes(self):
        """Two processes learn the same as one with the same total batch."""
        settings = f'{SCRIPTS["gpt2.py"]} --total_batch_size=256 --batch_size=8'
        folder, one = folder_with(TEXT), self.script('--total_batch_size=256 --batch_size=8')
        (folder / 'gpt2.py').write_text(read('gpt2.py'), encoding='utf-8')
        two = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone',
                              '--nproc_per_node=2', 'gpt2.py', *settings.split()], cwd=folder,
                             env=ENV, capture_output=True, encoding='utf-8')
        self.assertEqual(two.returncode, 0, two.stderr)
        self.assertIn('1 times 8 windows of 16 on 2 devices', two.stdout)
        self.assertIn('2 times 8 windows of 16 on 1 devices', one.out)
        a, b = checkpoint(one.folder), checkpoint(folder)
        self.assertEqual(len(a['losses']), len(b['losses']))
        for x, y in zip(a['losses'], b['losses']):
            self.assertAlmostEqual(x, y, delta=1e-4)
        for (x, step), (y, _) in zip(a['val_losses'], b['val_losses']):
            self.assertAlmostEqual(x, y, delta=1e-4)

    def test_memory(self):
        """Where memory does not suffice, half the windows at once give the same losses."""
        whole = self.script('--total_batch_size=256 --batch_size=16')
        def edit(source):
            return source.replace(
                '        part = part.to(device)\n', '        part = part.to(device)\n'
                '        if len(part) > 4 and step > 3: raise torch.OutOfMemoryError\n')
        halved = self.script('--total_batch_size=256 --batch_size=16', edit=edit)
        self.assertEqual(re.findall('now it is batch_size=(.*)', halved.out), ['8', '4'])
        for (_, _, a), (_, _, b) in zip(losses(whole.out), losses(halved.out)):
            self.assertAlmostEqual(a, b, delta=2e-4)
        names, seen = whole.names, []  # and each process takes its share of the windows
        windows = names['get_windows'](1)
        names.update(rank=1, world=2, over_ranks=lambda number: number, train_model=lambda x, y: (
            seen.append(x), torch.zeros((), requires_grad=True)))
        names['accumulate'](windows)
        self.assertTrue(torch.equal(torch.cat(seen), windows[1::2, :-1]))
        none = self.script(edit=lambda source: source.replace(
            '        part = part.to(device)\n', '        raise torch.OutOfMemoryError\n'))
        self.assertIn('out of memory', none.message)

    def test_hellaswag(self):
        """The chosen endings are those with the least loss, computed one by one."""
        rows = [{'ctx': f'☃ {a} ☃ is', 'label': 1 if i % 2 else i % 4, 'endings': [
            f'{b} and the {a} sees the {b}', '☃', f'the {a} sees' * (i % 3 + 1),
            'not seen by the king and fool']}
            for i, (a, b) in enumerate([('cat', 'moon'), ('moon', 'fool'), ('king', 'cat')] * 5)]
        lines = '\n'.join(map(json.dumps, rows)).encode()
        with Server({'/h.jsonl': lines}) as server:
            edit = lambda source: re.sub(r"questions = '.*'",
                                         f"questions = '{server.address}/h.jsonl'", source)
            cache = folder_with(None)
            run = self.script(f'--hellaswag=True --hellaswag_limit=13 --block_size=64 --cache_dir='
                              f'{cache} --total_batch_size=512', edit=edit)
            self.assertIsNone(run.message)
        model, encode = run.names['model'].float(), run.names['encoding'].encode_ordinary
        right = [0, 0]
        for row in rows[:13]:
            scores = []
            for ending in row['endings']:
                start, end = encode(row['ctx']), encode(' ' + ending)
                idx = (start + end)[-65:]
                loss = F.cross_entropy(model(torch.tensor([idx[:-1]]))[0][0], torch.tensor(idx[1:]),
                                       reduction='none')[-len(end):]
                scores.append((loss.sum().item(), loss.sum().item() / len(end)))
            for k in (0, 1):
                right[k] += min(range(4), key=lambda i: scores[i][k]) == row['label']
        self.assertNotEqual(*right)
        self.assertIn(f'{right[0] / 13:.4f} by sum, {right[1] / 13:.4f} by mean', run.out)

    def test_settings(self):
        """An export is loaded again, with its vocabulary; what does not fit together is told."""
        first = self.script('--export=out --top_k=1')
        folder = first.folder
        before = checkpoint(folder)
        again = self.script('--init_from=out --max_iters=0 --top_k=1', folder)
        self.assertEqual(first.out.split(LINE)[1], again.out.split(LINE)[1])
        for name, t in before['best'].items():
            self.assertTrue(torch.equal(t, again.names['best'][name]), name)
        config = json.loads((folder / 'out' / 'config.json').read_text())
        self.assertEqual((config['n_head'], config['activation_function']), (2, 'gelu_new'))
        (folder / 'out' / 'tokens.json').unlink()
        torch.save({'must_fit': {'script': 'gpt.py'}}, folder / 'gpt.pt')
        (folder / 'bad.pt').write_bytes(b'hello')
        (folder / 'empty.pt').write_bytes(b'')
        with mock.patch('tiktoken.get_encoding', side_effect=OSError('offline')):
            for more, message in (
                    ('--init_from=out', 'TIKTOKEN_CACHE_DIR'), ('--init_from=no', 'init_from=no'),
                    ('--init_from=resume --checkpoint=no.pt', 'no.pt'),
                    ('--init_from=resume --checkpoint=gpt.pt', 'another script'),
                    ('--init_from=resume --checkpoint=bad.pt', 'init_from=resume'),
                    ('--init_from=resume --checkpoint=empty.pt', 'init_from=resume'),
                    ('--init_from=resume --n_layer=3', 'made with n_layer=2'),
                    ('--dataset=no.txt', 'no.txt'), ('--dataset=out', 'TIKTOKEN_CACHE_DIR')):
                failed = self.script(more, folder)
                self.assertIsInstance(failed.message, str, more)
                self.assertIn(message, failed.message)
                self.assertNotIn('\n', failed.message)
        # a character whose bytes are several tokens is shown when it is whole
        idx = first.names['encoding'].encode_ordinary('☃')
        self.assertGreater(len(idx), 1)
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            for token in idx[:-1]:
                first.names['show'](torch.tensor([[token]]))
            self.assertEqual(shown.getvalue(), '')
            first.names['show'](torch.tensor([[idx[-1]]]))
        self.assertEqual(shown.getvalue(), '☃')


class Checkpoint(unittest.TestCase):
    """Stopped anywhere, resumed, and at the end the same to the last bit."""
    def long(self, script):
        return SCRIPTS[script] + ' --max_iters=200 --eval_interval=40'

    def same(self, a, b, key):
        if isinstance(a, dict):
            self.assertEqual(a.keys(), b.keys())
            for k in a:
                self.same(a[k], b[k], f'{key}.{k}')
        elif isinstance(a, list) and a and isinstance(a[0], dict):
            self.same(dict(enumerate(a)), dict(enumerate(b)), key)
        else:
            self.assertTrue(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key)

    def stopped(self, script, how):
        """A run that got the signal after its first evaluation; the step of its checkpoint."""
        folder = folder_with(TEXT)
        process = start(script, self.long(script), folder)
        while not list(folder.glob('*.pt')) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(how)
        out, err = process.communicate(timeout=100)
        return types.SimpleNamespace(folder=folder, out=out, err=err, code=process.returncode,
                                     step=checkpoint(folder)['step'])

    @unittest.skipUnless(hasattr(signal, 'SIGKILL'), 'needs the signals of Linux or macOS')
    def test_resume(self):
        killed, ended = together((self.stopped, 'gpt.py', signal.SIGKILL),
                                 (self.stopped, 'gpt.py', signal.SIGINT))
        whole = execute('gpt.py', self.long('gpt.py'))
        self.assertEqual((whole.message, killed.code), (None, -signal.SIGKILL))
        self.assertEqual((ended.code, ended.err), (0, ''))
        self.assertEqual(len(ended.out.split(LINE)[1]), 41)  # Ctrl-C: saved, and a sample
        self.assertEqual(losses(ended.out)[-1][0], ended.step)
        again = f'{self.long("gpt.py")} --resume=True'
        resumed = together((run, 'gpt.py', again, killed.folder),
                           (run, 'gpt.py', again, ended.folder))
        for before, after in zip((killed, ended), resumed):
            self.assertTrue(0 < before.step < 200, before.step)
            self.assertIn(f'resumed from gpt.pt after step {before.step}\n', after.out)
            self.same_end(after, whole, 'gpt.pt')

    def same_end(self, a, b, file):
        self.assertEqual(*(without_seconds(run.out).split(LINE)[1:] for run in (a, b)))
        a, b = (torch.load(run.folder / file, weights_only=True) for run in (a, b))
        for key in 'model', 'best', 'optimizer', 'random', 'losses', 'step':
            self.same(a[key], b[key], key)

    def test_resume_in_any_script(self):
        """Ended right after a checkpoint, or by Ctrl-C between two; in any stage; then resumed."""
        for script, more, stage, file in (
                ('modern_gpt.py', '', '', 'modern_gpt.pt'),
                ('addition_gpt.py', '', '', 'addition_gpt.pt'),
                ('gpt2.py', ' --dropout=0.1', '', 'gpt2.pt'),
                ('pretrain_finetune.py', '', 'pretrain', 'pretrained_gpt.pt'),
                ('pretrain_finetune.py', ' --lora_rank=2', 'finetune', 'finetuned_gpt.pt'),
                ('pretrain_finetune.py', '', 'scratch', 'scratch_gpt.pt')):
            settings = SCRIPTS[script] + more
            whole = execute(script, settings)
            again = '--init_from=resume' if script == 'gpt2.py' else '--resume=True'
            for line, stop, at in ((': save()', 'sys.exit("killed")', 8),
                                   ('scaler.update()', 'interrupts.append(True)', 5)):
                with self.subTest(f'{script} {stage} {stop}'):
                    def edit(source):
                        here = f"(globals().get('stage', ''), step) == ('{stage}', {at})"
                        return source.replace(line, f'{line}; {here} and {stop}')
                    stopped = execute(script, settings, edit=edit)
                    self.assertEqual(stopped.message, 'killed' if at == 8 else None)
                    self.assertEqual(losses(stopped.out)[-1][0], at)
                    after = execute(script, f'{settings} {again}', stopped.folder)
                    self.assertIn(f'resumed from {file} after step {at}\n', after.out)
                    self.same_end(after, whole, file)
            if stage != 'pretrain': self.only_samples(script, f'{settings} {again}', whole.folder)

    def only_samples(self, script, settings, folder):
        before = {path: path.read_bytes() for path in folder.glob('*.pt')}
        setting = 'problem' if script == 'addition_gpt.py' else 'prompt'
        for prompt in ('12+9', '0+0') if setting == 'problem' else ('HAMLET:', 'The'):
            only = execute(script, f'{settings} --max_iters=0 --{setting}={prompt}', folder)
            self.assertEqual((only.message, losses(only.out)), (None, []))
            self.assertTrue(only.out.split(LINE)[-1].startswith(prompt))
        self.assertEqual({path: path.read_bytes() for path in folder.glob('*.pt')}, before)

    def test_best_weights(self):
        """Where the loss rises again, the best weights are kept and used to sample."""
        text = 'to be or not ' * 400 + 'KING' * 150  # the more it learns, the less it expects him
        trained = execute('gpt.py', GPT, folder_with(text))
        saved = checkpoint(trained.folder)
        (loss, step), (last_loss, last_step) = min(saved['val_losses']), saved['val_losses'][-1]
        self.assertLess(step, last_step)
        self.assertEqual(saved['step'], last_step)
        self.assertIn(f'best val loss {loss:.4f} (step {step})', trained.out)
        names = execute('gpt.py', f'{GPT} --resume=True --max_iters=0', trained.folder).names
        self.assertAlmostEqual(names['evaluate'](), loss, places=6)
        names['model'].load_state_dict(saved['model'])
        self.assertAlmostEqual(names['evaluate'](), last_loss, places=6)

    def test_unfit(self):
        """A checkpoint that is damaged or of something else gets its line, and stays as it is."""
        folder = execute('gpt.py', GPT + ' --max_iters=1').folder
        file, other, weights = folder / 'gpt.pt', io.BytesIO(), io.BytesIO()
        good = file.read_bytes()
        torch.save({'must_fit': {'script': 'other.py'}}, other)
        torch.save(nn.Linear(2, 2).state_dict(), weights)
        for contents, setting, message in (
                *((damaged, '', 'cannot resume from gpt.pt') for damaged in (
                    good[:len(good) // 2], b'', b'hello', weights.getvalue())),
                (other.getvalue(), '', "script='other.py'"), (good, '--n_layer=3', 'n_layer=2'),
                (good, '--norm=post --n_head=4', "n_head=2, norm='pre'")):
            file.write_bytes(contents)
            unfit = execute('gpt.py', f'{GPT} --resume=True {setting}', folder)
            self.assertIn(message, unfit.message)
            self.assertNotIn('\n', unfit.message)
            self.assertEqual(file.read_bytes(), contents)
        modern = execute('modern_gpt.py', GPT).folder
        for setting, fits in (('--muon=False', 'muon=True'), ('--smear=2', 'smear=3'),
                              ('--activation=relu', "activation='swiglu'"),
                              ('--checkpoint=gpt.pt', "script='gpt.py'")):
            shutil.copy(file, modern / 'gpt.pt')
            unfit = execute('modern_gpt.py', f'{GPT} --resume=True {setting}', modern)
            self.assertIn(fits, unfit.message)
        (folder / 'input.txt').write_text(TEXT + 'Ω' * 9, encoding='utf-8')
        self.assertIn('chars=', execute('gpt.py', f'{GPT} --resume=True', folder).message)

    @unittest.skipUnless(os.path.exists('/dev/full'), 'needs /dev/full')
    def test_full_disk(self):
        """The line says so, and the old checkpoint is still there."""
        folder = execute('gpt.py', GPT).folder
        before = (folder / 'gpt.pt').read_bytes()
        (folder / 'gpt.pt.tmp').symlink_to('/dev/full')
        full = execute('gpt.py', GPT, folder)
        self.assertIn('could not write gpt.pt', full.message)
        self.assertNotIn('\n', full.message)
        self.assertEqual((folder / 'gpt.pt').read_bytes(), before)

    def test_not_finite(self):
        """A loss that is not finite stops the run before it can spoil the checkpoint."""
        folder = execute('gpt.py', GPT).folder
        before = (folder / 'gpt.pt').read_bytes()
        for interval in 1, 12:  # seen first in the evaluation, and in training
            wild = f'{GPT} --learning_rate=1e30 --grad_clip=1e30 --eval_interval={interval}'
            diverged = execute('gpt.py', wild, folder)
            self.assertRegex(diverged.message, r'^step \d+: the loss is not finite: try a lower')
            self.assertEqual((folder / 'gpt.pt').read_bytes(), before)


class Terminal(unittest.TestCase):
    @unittest.skipUnless(hasattr(os, 'openpty'), 'needs a pseudo-terminal')
    def test_progress(self):
        """In a terminal one line refreshes in place; evaluations and the curve are as in a pipe."""
        folder = folder_with(TEXT)
        controller, terminal = os.openpty()
        settings = (SCRIPTS['gpt.py'] + ' --max_iters=200 --eval_interval=100').split()
        process = subprocess.Popen([sys.executable, HERE / 'gpt.py', *settings], cwd=folder,
                                   env=ENV, stdout=terminal)
        os.close(terminal)
        output = b''
        with contextlib.suppress(OSError):  # the end of the terminal
            while piece := os.read(controller, 65536):
                output += piece
        os.close(controller)
        self.assertEqual(process.wait(), 0)
        output = output.decode().replace('\r\n', '\n')
        self.assertRegex(output, r'\rstep \d+/200, loss \d\.\d{4}, [\d,]+ tokens/s, \d+ s left')
        lines = [line.rsplit('\r', 1)[-1] for line in output.split('\n')]  # what stays to be read
        self.assertEqual([step for step, *_ in losses('\n'.join(lines))], [100, 200])
        curve = [line for line in lines if re.match(r' ?\d\.\d\d \|', line)]
        self.assertEqual(len(curve), 11)
        heights = {line.index('o', i) - 7: float(line[:5]) for line in curve
                   for i, mark in enumerate(line) if mark == 'o'}
        row = (float(curve[0][:5]) - float(curve[-1][:5])) / 10
        self.assertEqual(sorted(heights), [31, 63])  # the columns of steps 100 and 200
        for column, (_, _, loss) in zip((31, 63), losses('\n'.join(lines))):
            self.assertLess(abs(heights[column] - loss), row * 0.51 + 0.01)
        self.assertEqual(curve[0][7], '.')  # it starts at the top left
        self.assertRegex(curve[-1], r'[.o] *$')


class Repository(unittest.TestCase):
    def test_shared_blocks(self):
        """What several scripts have in common is in each of them word for word the same."""
        OWN = {'': {'__init__', 'forward'}}  # what a script says in its own way: its ideas
        OWN['modern_gpt.py'] = OWN[''] | {'get_batch', 'make_norm', 'generate', 'step'}
        OWN['addition_gpt.py'] = OWN[''] | {'get_batch', 'generate', 'evaluate'}
        OWN['pretrain_finetune.py'] = OWN[''] | {'get_batch'}
        OWN['gpt2.py'] = OWN[''] | {'generate', 'evaluate', 'append', 'gradient', 'sampling'}
        blocks = {  # from the first of the two to the second
            'device': ('gpus = ', 'else next('), 'overrides': ('# overrides', '__name__})?'),
            'data': ('source = ', '\ndef get_batch'),
            'gradient': ('optimizer.zero_grad()', 'last = step'),
            'progress': ('elif clear and', 'if first <='),
            'sampling': ('idx = torch.tensor(', 'print()')}
        shared = collections.defaultdict(dict)
        for script in SCRIPTS:
            source = read(script)
            for name, (first, last) in blocks.items():
                if found := re.search(rf'^ *{re.escape(first)}.*?{re.escape(last)}', source,
                                      re.M | re.S):  # it may stand in another loop
                    if name in OWN.get(script, OWN['']): continue
                    shared[name][script] = textwrap.dedent(found[0])
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef) and node.name not in OWN.get(script, OWN['']):
                    shared[node.name][script] = ast.get_source_segment(source, node)
        for name, versions in shared.items():
            with self.subTest(name):
                self.assertEqual(len(set(versions.values())), 1, ' and '.join(versions))
        several = {name for name, versions in shared.items() if len(versions) > 1}
        self.assertGreaterEqual(several, {*blocks, 'get_batch', 'generate', 'evaluate', 'save',
                                          'plot', 'milliseconds'})

    def test_form(self):
        """Every script: the inline metadata, the same sections in order, only allowed imports."""
        for script in SCRIPTS:
            source = read(script)
            self.assertTrue(source.startswith('# /// script\n# requires-python = '), script)
            self.assertEqual(re.findall(r'^# -{60,} (.+)$', source, re.M),
                             ['hyperparameters', 'data', 'model', 'training', 'sampling'], script)
            self.assertLessEqual(max(map(len, source.split('\n'))), 100, script)
            nodes = list(ast.walk(ast.parse(source)))
            names = {alias.name for node in nodes if isinstance(node, ast.Import)
                     for alias in node.names}
            names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            allowed = {*sys.stdlib_module_names, 'torch', 'tiktoken', 'numpy'}
            self.assertLessEqual({name.split('.')[0] for name in names}, allowed, script)

    def test_readme(self):
        """Every command in the README runs (scaled down); the code that it quotes is the code."""
        readme = read('README.md')
        commands = re.findall(r'^(?:python|uv run) (\w+\.py)(.*)$', readme, re.M)
        commands = [command for command in dict.fromkeys(commands) if command[0] in SCRIPTS]
        self.assertEqual({script for script, _ in commands}, set(SCRIPTS))
        # what gpt2.py would download: an export of its own in place of OpenAI's weights
        export = execute('gpt2.py', f'{QUICK["gpt2.py"]} --export=out').folder / 'out'
        row = json.dumps({'ctx': 'The king', 'label': 1, 'endings': ['sees', 'is', 'the', 'fool']})
        (pathlib.Path(ROOT.name) / 'cache' / 'hellaswag_val.jsonl').write_text(row)
        for script, settings in commands:
            with self.subTest(script + settings):
                quick = re.sub('init_from=gpt2\\S*', f'init_from={export}', settings.split('#')[0])
                limit = '--max_iters=2 ' if '--max_iters=0' in settings else ''
                quick += ' ' + QUICK[script].removeprefix(limit)
                folder = None
                if 'resume' in settings:  # there has to be something to go on from
                    folder = execute(script, QUICK[script]).folder
                self.assertIsNone(execute(script, quick, folder).message)
        for quoted in re.findall(r'^```python\n(.*?)^```', readme, re.M | re.S):
            for line in quoted.splitlines():
                self.assertTrue(any(line + '\n' in read(script) for script in SCRIPTS), line)


if __name__ == '__main__':
    unittest.main()

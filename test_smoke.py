"""The smoke test: each script is used as people use it, for a few steps, and must learn and compute what it says.

    python test_smoke.py            (or pytest test_smoke.py; one test: python test_smoke.py EveryScript.test_learns)

It needs torch, numpy and tiktoken, no network and no GPU, and ends in under two minutes on two cores.
"""
import ast, concurrent.futures, contextlib, functools, hashlib, http.server, io, math, os, pathlib, re
import signal, subprocess, sys, tempfile, threading, time, unittest
import torch
import torch.nn as nn
from torch.nn import functional as F

HERE = pathlib.Path(__file__).resolve().parent
# Each script with settings for a few steps; one more script joins by one more line.
SMALL = '--device=cpu --batch_size=8 --block_size=16 --max_new_tokens=40 --max_iters=12 --eval_interval=4'
GPT = SMALL + ' --dtype=float32 --n_layer=2 --n_head=2 --n_embd=32 --warmup_iters=1 --learning_rate=0.01'
SCRIPTS = {
    'bigram.py': SMALL,
    'gpt.py': GPT + ' --dropout=0.1',
}
ORDER = [name for name in ('bigram.py', 'gpt.py', 'addition_gpt.py', 'pretrain_finetune.py',
                           'modern_gpt.py', 'gpt2.py') if (HERE / name).exists()]
# 6,000 characters that a model can learn a little of in a dozen steps, with a few beyond ASCII
TEXT = ''.join(f'{who}:\nThe {a} sees the {b}, naïve “{a}” — {i % 7}.\n\n' for i in range(40) for who, a, b in (
    ('DUKE', 'cat', 'moon'), ('FOOL', 'moon', 'king'), ('KING', 'fool', 'cat')))[:6000]
torch.set_num_threads(1)  # as in the runs below, so that in-process results can be compared with theirs


class Run:
    """One run of a script, alone in a folder of its own (or the one given) beside a text."""

    def __init__(self, script, settings='', folder=None, text=TEXT, edit=lambda source: source, wait=True):
        self.folder = pathlib.Path(folder or tempfile.mkdtemp(dir=ROOT.name))
        if text is not None:
            (self.folder / 'input.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
        (self.folder / script).write_text(edit((HERE / script).read_text(encoding='utf-8')), encoding='utf-8')
        self.process = subprocess.Popen(
            [sys.executable, script, *(settings.split() if isinstance(settings, str) else settings)],
            cwd=self.folder, env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding='utf-8')
        if wait:
            self.finish()

    def finish(self):
        self.out, self.err = self.process.communicate(timeout=100)
        self.code = self.process.returncode
        return self

    def losses(self):
        """[(step, train loss, val loss)] as printed."""
        found = re.findall(r'^step +(\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4}), \d+\.\d s$', self.out, re.M)
        return [(int(step), float(train), float(val)) for step, train, val in found]

    def checkpoint(self, name):
        return torch.load(self.folder / name, weights_only=True)


def together(*calls):
    """Run the calls two at a time (there are two cores) and give their results in order."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda call: call(), calls))


def runs(*arguments):
    """Run(*a) for each, two at a time."""
    return together(*(functools.partial(Run, *a) for a in arguments))


def cell(script, namespace, folder, **constants):
    """Run a script as a notebook cell: constants edited in its text, the kernel's argv, no __file__; its output."""
    source = (HERE / script).read_text(encoding='utf-8')
    for name, value in constants.items():
        source, count = re.subn(rf'^{name} = .*$', lambda _: f'{name} = {value!r}', source, flags=re.M)
        assert count == 1, f'{script} has {count} lines "{name} = ..."'
    argv, where, handler, output = sys.argv, os.getcwd(), signal.getsignal(signal.SIGINT), io.StringIO()
    sys.argv = ['/usr/lib/python3/site-packages/ipykernel_launcher.py', '-f', '/tmp/kernel-1.json']
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(output):
            exec(compile(source, '<cell>', 'exec'), namespace)
    finally:
        sys.argv = argv
        os.chdir(where)
        signal.signal(signal.SIGINT, handler)
    return output.getvalue()


def constants(settings):
    """'--a=1 --b=x' -> {'a': 1, 'b': 'x'}"""
    pairs = (setting.removeprefix('--').split('=') for setting in settings.split())
    return {name: ast.literal_eval(value) if value[0] in '0123456789TF' else value for name, value in pairs}


def setUpModule():
    global ROOT, ENV
    ROOT = tempfile.TemporaryDirectory()
    ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONIOENCODING='utf-8', http_proxy='', https_proxy='')


def tearDownModule():
    ROOT.cleanup()


def without_seconds(output):
    return re.sub(r'\d+\.\d s|[\d,]+ tokens/s', '', output)


class EveryScript(unittest.TestCase):
    def each(self):
        for script, settings in SCRIPTS.items():
            with self.subTest(script):
                yield script, settings

    def test_learns(self):
        """Alone in a folder beside a text: starts near ln(vocabulary), falls, writes, and does it again the same."""
        for script, settings in self.each():
            a, b, c = runs((script, settings + ' --eval_interval=1'), (script, settings), (script, settings + ' --seed=5'))
            self.assertEqual((a.code, a.err), (0, ''))
            losses = a.losses()
            self.assertEqual(len(losses), 12)
            self.assertAlmostEqual(losses[0][1], math.log(len(set(TEXT))), delta=0.35)
            self.assertLess(losses[-1][2], losses[0][2] - 0.1)
            # evaluating more often changes nothing, another seed does
            self.assertEqual([line for line in losses if line[0] % 4 == 0], b.losses())
            self.assertNotEqual(b.losses(), c.losses())
            sample = a.out.split('-' * 64 + '\n')[1]
            self.assertEqual(len(sample), 41)
            self.assertLessEqual(set(sample), set(TEXT))

    def test_notebook(self):
        """Pasted one after the other into one kernel, with edited constants: the same output as from the shell."""
        namespace = {'__name__': '__main__'}
        shell = runs(*SCRIPTS.items())
        for (script, settings), run in zip(self.each(), shell):
            output = cell(script, namespace, run.folder, **constants(settings))
            self.assertEqual(without_seconds(output), without_seconds(run.out))
        again = cell(ORDER[0], namespace, shell[0].folder, **constants(SCRIPTS[ORDER[0]]))
        self.assertEqual(without_seconds(again), without_seconds(shell[0].out))

    def test_bad_settings(self):
        """Each ends in one line on stderr that names what is wrong, with exit code 1."""
        for script, settings in self.each():
            wrong = {
                '--max_itres=5': 'did you mean --max_iters=', '--max_iters=many': 'did you mean --max_iters=',
                '--max_iters=1.5': '(int)', 'max_iters': 'did you mean', '--batch_size=0': 'batch_size=0',
                '--temperature=0': 'temperature=0.0', '--device=cuda:9': 'device=cuda:9', '--prompt=[]': "'['",
            }
            if 'n_embd' in settings:
                wrong |= {'--n_head=3': 'n_head=3', '--dropout=1': 'dropout=1.0', '--dropout=some': '(float)',
                          '--resume=yes': '(bool)', '--resume=True': 'resume from', '--dtype=int3': 'dtype=int3'}
            for (setting, message), run in zip(wrong.items(), runs(*((script, [*settings.split(), s]) for s in wrong))):
                self.one_line(run, message, setting)

    def test_bad_text(self):
        for script, settings in self.each():
            empty, short, latin, fits = runs(
                (script, settings, None, ''), (script, settings, None, 'to be'),
                (script, settings, None, 'Caf\xe9 '.encode('latin-1') * 99), (script, settings, None, 'to be or\r\n' * 4))
            self.one_line(empty, '0 characters')
            self.one_line(short, '5 characters')
            self.one_line(latin, 'UTF-8')
            self.assertEqual((fits.code, fits.err), (0, ''))

    def one_line(self, run, message, what=''):
        with self.subTest(what or message):
            self.assertEqual((run.code, run.err.count('\n')), (1, 1), run.err)
            self.assertIn(message, run.err)

    def test_download(self):
        """No input.txt: it is fetched whole, or not at all and a line says where from and what to do."""
        good = TEXT.encode()
        bodies = {'/good': good, '/damaged': good[:-1] + b'?', '/short': good[:-100]}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200 if self.path in bodies else 404)
                self.send_header('Content-Length', len(good))
                self.end_headers()
                self.wfile.write(bodies.get(self.path, b''))

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for script, settings in self.each():
            def fetch(path, port=server.server_port):
                return functools.partial(Run, script, settings, text=None, edit=lambda source: re.sub(
                    r"'https://raw[^']+'", f"'http://127.0.0.1:{port}{path}'", source).replace(
                    '86c4e6aa9db7c042', hashlib.sha256(good).hexdigest()[:16]))
            whole, damaged, short, missing, refused = together(
                *(fetch(path) for path in ('/good', '/damaged', '/short', '/missing')), fetch('/', port=1))
            self.assertEqual((whole.code, whole.err), (0, ''))
            self.assertEqual((whole.folder / 'input.txt').read_bytes(), good)
            for run, path in (damaged, '/damaged'), (short, '/short'), (missing, '/missing'), (refused, ':1/'):
                self.one_line(run, path)
                self.assertIn('input.txt in this folder', run.err)
                self.assertEqual(sorted(p.name for p in run.folder.iterdir()), [script])
        server.shutdown()
        server.server_close()


class Model(unittest.TestCase):
    """What the transformer of gpt.py computes, on the script's own functions."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(dir=ROOT.name)
        (pathlib.Path(cls.folder) / 'input.txt').write_text(TEXT, encoding='utf-8')

    def gpt(self, **settings):
        """The namespace of gpt.py, run without training."""
        namespace = {'__name__': '__main__'}
        cell('gpt.py', namespace, self.folder, **constants(GPT) | {'max_iters': 0} | settings)
        return namespace

    def test_attention(self):
        """The written-out softmax equals F.scaled_dot_product_attention, for full and for short windows."""
        g = self.gpt()
        attention = g['CausalSelfAttention']()
        for T in (16, 5, 1):
            x = torch.randn(3, T, 32)
            q, k, v = (z.view(3, T, 2, 16).transpose(1, 2) for z in attention.c_attn(x).chunk(3, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(3, T, 32)
            torch.testing.assert_close(attention(x), attention.c_proj(y))

    def test_causal(self):
        """Another later token changes no earlier logits, and does change its own."""
        for g in (self.gpt(), self.gpt(norm='post'), self.gpt(norm='none', residual=False, mlp_width=0)):
            model = g['model'].eval()
            idx = torch.randint(g['vocab_size'], (2, 16))
            other = idx.clone()
            other[:, 9] = (other[:, 9] + 1) % g['vocab_size']
            a, b = model(idx)[0], model(other)[0]
            self.assertTrue(torch.equal(a[:, :9], b[:, :9]))
            self.assertGreater((a[:, 9:] - b[:, 9:]).abs().amax(dim=2).min().item(), 0)

    def test_block(self):
        """The switches residual, norm and mlp_width build the block that they name."""
        x = torch.randn(2, 16, 32)
        formulas = {
            ('pre', True): lambda x, f, ln: x + f(ln(x)), ('post', True): lambda x, f, ln: ln(x + f(x)),
            ('none', True): lambda x, f, ln: x + f(x), ('none', False): lambda x, f, ln: f(x),
            ('pre', False): lambda x, f, ln: f(ln(x)), ('post', False): lambda x, f, ln: ln(f(x)),
        }
        for (norm, residual), formula in formulas.items():
            for mlp_width in (0, 1, 4):
                block = self.gpt(norm=norm, residual=residual, mlp_width=mlp_width)['Block']()
                y = formula(x, block.attn, block.ln_1)
                if mlp_width:
                    self.assertEqual(block.mlp.c_fc.out_features, 32 * mlp_width)
                    y = formula(y, block.mlp, block.ln_2)
                torch.testing.assert_close(block(x), y)

    def test_ladder(self):
        """Each rung trains and sets what it says; what the command line sets outranks it."""
        rungs = runs(*(('gpt.py', f'--rung={r} --max_iters=4 --eval_interval=4 --max_new_tokens=9') for r in range(2, 13)))
        parameters = []
        for run in rungs:
            self.assertEqual((run.code, run.err), (0, ''))
            parameters.append(int(re.search(r'([\d,]+) parameters', run.out)[1].replace(',', '')))
            self.assertEqual(len(run.losses()), 1)
        two, three, four, five, six, seven, eight, nine, ten, eleven, twelve = parameters
        self.assertTrue(two == three < four < five == six < seven < eight < nine == ten < eleven < twelve, parameters)
        self.assertTrue(2.8e5 < eleven < 3.3e5, eleven)
        fits = rungs[1].checkpoint('gpt.pt')['must_fit']
        self.assertEqual((fits['n_head'], fits['mlp_width'], fits['residual'], fits['norm']), (4, 0, False, 'none'))
        set_here = Run('gpt.py', '--rung=9 --n_layer=1 --norm=post --max_iters=1 --max_new_tokens=1')
        fits = set_here.checkpoint('gpt.pt')['must_fit']
        self.assertEqual((fits['n_layer'], fits['norm'], fits['mlp_width'], fits['residual']), (1, 'post', 4, True))
        for rung in (1, 13):
            self.assertIn(f'rung={rung}', Run('gpt.py', f'--rung={rung}').err)

    def test_evaluation(self):
        """It is the mean over every character of the validation split but the first, whatever the batch, with no chance."""
        g = self.gpt(dropout=0.5)
        model, val, T = g['model'], g['val_data'], 16
        random = torch.get_rng_state()
        loss = g['evaluate']()
        self.assertTrue(torch.equal(random, torch.get_rng_state()))
        self.assertTrue(model.training)
        model.eval()
        with torch.no_grad():
            each = [F.cross_entropy(model(val[None, i:i + T][:, :len(val) - 1 - i])[0][0], val[i + 1:i + T + 1], reduction='sum')
                    for i in range(0, len(val) - 1, T)]
        self.assertGreater((len(val) - 1) % T, 0)  # the last window is a short one
        self.assertAlmostEqual(loss, sum(each).item() / (len(val) - 1), places=5)
        self.assertAlmostEqual(loss, self.gpt(dropout=0.5, batch_size=3)['evaluate'](), places=9)

    def test_sampling(self):
        """Past block_size, with top_k and temperature as they should be, and each token handed over at once."""
        g = self.gpt(dropout=0.5)
        model, idx, seen = g['model'].eval(), torch.zeros(2, 1, dtype=torch.long), []
        out = model.generate(idx, 40, top_k=1, on_token=seen.append)
        self.assertTrue(torch.equal(out, torch.cat([idx, *seen], dim=1)))
        for t in range(1, 41):  # greedy: each token is the likeliest one after the 16 before it
            self.assertTrue(torch.equal(out[:, t], model(out[:, max(0, t - 16):t])[0][:, -1].argmax(dim=-1)))
        cold = model.generate(idx, 40, temperature=1e-4)
        self.assertTrue(torch.equal(out, cold))
        probabilities = F.softmax(model(idx[:1])[0][0, -1] / 2, dim=-1)
        drawn = torch.cat([model.generate(idx[:1].repeat(2000, 1), 1, temperature=2.0, top_k=k)[:, 1] for k in (0, 3)])
        self.assertLessEqual(set(drawn[2000:].tolist()), set(probabilities.topk(3).indices.tolist()))
        share = torch.bincount(drawn[:2000], minlength=g['vocab_size']) / 2000
        self.assertLess((share - probabilities).abs().max().item(), 0.05)

    def test_number_types(self):
        """bfloat16 and float16 (with loss scaling) learn what float32 learns, nearly."""
        kinds = runs(*(('gpt.py', f'{GPT} --dtype={kind}') for kind in ('float32', 'bfloat16', 'float16')))
        losses = [[train for _, train, _ in run.losses()] for run in kinds]
        for kind, run, loss in zip(('float32', 'bfloat16', 'float16'), kinds, losses):
            self.assertIn(f'{kind}: as set', run.out.split('\n')[0])
            self.assertLess(abs(loss[-1] - losses[0][-1]), 0.02)
        self.assertNotEqual(losses[0], losses[1])
        self.assertIn(float, [type(v) for v in kinds[2].checkpoint('gpt.pt')['scaler'].values()])


class Checkpoint(unittest.TestCase):
    """Stopped anywhere, resumed, and at the end the same to the last bit."""
    SETTINGS = SCRIPTS['gpt.py'] + ' --max_iters=300 --eval_interval=50'

    def equal(self, a, b):
        for key in ('model', 'best', 'optimizer', 'losses', 'val_losses', 'random'):
            self.same(a[key], b[key], key)

    def same(self, a, b, key):
        if isinstance(a, dict):
            self.assertEqual(a.keys(), b.keys())
            for k in a:
                self.same(a[k], b[k], f'{key}.{k}')
        else:
            self.assertTrue(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key)

    def stopped(self, how, script='gpt.py', settings=SETTINGS, name='gpt.pt'):
        """A run that got the signal after its first evaluation."""
        run = Run(script, settings, wait=False)
        while not (run.folder / name).exists() and run.process.poll() is None:
            time.sleep(0.01)
        run.process.send_signal(how)
        return run.finish()

    def test_resume(self):
        whole, killed, stopped = together(
            lambda: Run('gpt.py', self.SETTINGS), lambda: self.stopped(signal.SIGKILL), lambda: self.stopped(signal.SIGINT))
        self.assertEqual((whole.code, killed.code, stopped.code, stopped.err), (0, -signal.SIGKILL, 0, ''))
        end = whole.checkpoint('gpt.pt')
        self.assertEqual(end['step'], 300)
        self.assertEqual(len(stopped.out.split('-' * 64 + '\n')[1]), 41)  # Ctrl-C: saved, and a sample
        at = [run.checkpoint('gpt.pt')['step'] for run in (killed, stopped)]
        self.assertTrue(0 < at[0] < 300 and 0 < at[1] < 300, at)
        self.assertEqual(stopped.losses()[-1][0], at[1])
        resumed = runs(*(('gpt.py', self.SETTINGS + ' --resume=True', run.folder) for run in (killed, stopped)))
        for run, step in zip(resumed, at):
            self.assertIn(f'resumed from gpt.pt after step {step}\n', run.out)
        self.same(resumed[0].checkpoint('gpt.pt')['val_losses'], end['val_losses'], 'val_losses')
        self.equal(resumed[0].checkpoint('gpt.pt'), end)
        a, b = resumed[1].checkpoint('gpt.pt'), end
        for key in ('model', 'optimizer', 'losses', 'random'):  # it has one evaluation more, at the stop
            self.same(a[key], b[key], key)
        self.assertEqual(resumed[0].out.split('-' * 64)[1], whole.out.split('-' * 64)[1])

        before = (whole.folder / 'gpt.pt').read_bytes()
        only = runs(*(('gpt.py', self.SETTINGS + f' --resume=True --max_iters=0 --top_k=1 --prompt={prompt}', whole.folder)
                      for prompt in ('DUKE:', 'The')))
        self.assertEqual((whole.folder / 'gpt.pt').read_bytes(), before)
        for run, prompt in zip(only, ('DUKE:', 'The')):
            self.assertEqual((run.code, run.err, run.losses()), (0, '', []))
            self.assertTrue(run.out.split('-' * 64 + '\n')[1].startswith(prompt))

    def test_best_weights(self):
        """Where the loss rises again, the best weights are kept and sampled, the last ones resumed."""
        run = Run('gpt.py', GPT + ' --max_iters=24 --learning_rate=0.5 --norm=none')
        saved = run.checkpoint('gpt.pt')
        best = min(saved['val_losses'], key=lambda pair: pair[1])
        self.assertLess(best[0], 24)
        self.assertEqual(saved['step'], 24)
        self.assertIn(f'best val loss {best[1]:.4f} (step {best[0]})', run.out)
        namespace = {'__name__': '__main__'}
        cell('gpt.py', namespace, run.folder, **constants(GPT) | {'norm': 'none', 'max_iters': 0, 'resume': True})
        self.assertAlmostEqual(namespace['evaluate'](), best[1], places=6)

    def test_unfit(self):
        """A checkpoint that is damaged, of something else or of other settings gets its line, and stays as it is."""
        settings = SCRIPTS['gpt.py'] + ' --max_iters=1'
        run = Run('gpt.py', settings)
        good = (run.folder / 'gpt.pt').read_bytes()
        other = io.BytesIO()
        torch.save({'must_fit': {'script': 'other.py'}}, other)
        weights = io.BytesIO()
        torch.save(nn.Linear(2, 2).state_dict(), weights)
        for contents, setting, message in (
                (good[:len(good) // 2], '', 'cannot resume from gpt.pt'), (b'', '', 'cannot resume from gpt.pt'),
                (b'hello', '', 'cannot resume from gpt.pt'), (weights.getvalue(), '', 'cannot resume from gpt.pt'),
                (other.getvalue(), '', 'script=other.py'), (good, ' --n_layer=3', 'n_layer=2'),
                (good, ' --norm=post --n_head=4', 'n_head=2, norm=pre')):
            (run.folder / 'gpt.pt').write_bytes(contents)
            again = Run('gpt.py', settings + ' --resume=True' + setting, run.folder)
            self.assertEqual((again.code, again.err.count('\n')), (1, 1), again.err)
            self.assertIn(message, again.err)
            self.assertEqual((run.folder / 'gpt.pt').read_bytes(), contents)
        (run.folder / 'gpt.pt').write_bytes(good)
        again = Run('gpt.py', settings + ' --resume=True', run.folder, text=TEXT + 'Ω' * 9)
        self.assertIn('chars=', again.err)

    @unittest.skipUnless(os.path.exists('/dev/full'), 'needs /dev/full')
    def test_full_disk(self):
        """The line says so, and the old checkpoint is still there."""
        settings = SCRIPTS['gpt.py'] + ' --max_iters=2'
        run = Run('gpt.py', settings)
        before = (run.folder / 'gpt.pt').read_bytes()
        (run.folder / 'gpt.pt.tmp').symlink_to('/dev/full')
        again = Run('gpt.py', settings, run.folder)
        self.assertEqual((again.code, again.err.count('\n')), (1, 1), again.err)
        self.assertIn('could not write gpt.pt', again.err)
        self.assertEqual((run.folder / 'gpt.pt').read_bytes(), before)

    def test_not_finite(self):
        """A loss that is not finite stops the run; the last good checkpoint is kept."""
        run = Run('gpt.py', SCRIPTS['gpt.py'] + ' --learning_rate=1e30 --eval_interval=1 --grad_clip=1e30')
        self.assertEqual((run.code, run.err.count('\n')), (1, 1), run.err)
        self.assertRegex(run.err, r'step \d+: the loss is (nan|inf): lower learning_rate')


class Terminal(unittest.TestCase):
    @unittest.skipUnless(hasattr(os, 'openpty'), 'needs a pseudo-terminal')
    def test_progress(self):
        """In a terminal one line refreshes in place; the curve and the evaluations are as in a pipe."""
        folder = tempfile.mkdtemp(dir=ROOT.name)
        pathlib.Path(folder, 'input.txt').write_text(TEXT, encoding='utf-8')
        controller, terminal = os.openpty()
        settings = (SCRIPTS['gpt.py'] + ' --max_iters=200 --eval_interval=100').split()
        process = subprocess.Popen([sys.executable, HERE / 'gpt.py', *settings], cwd=folder, env=ENV, stdout=terminal)
        os.close(terminal)
        output = b''
        with contextlib.suppress(OSError):  # the end of the terminal
            while piece := os.read(controller, 65536):
                output += piece
        os.close(controller)
        self.assertEqual(process.wait(), 0)
        shown = re.findall(r'\rstep (\d+)/200, loss \d\.\d{4}, [\d,]+ tokens/s, \d+ s left', output.decode())
        self.assertGreaterEqual(len(shown), 1)
        lines = [line.rsplit('\r', 1)[-1] for line in output.decode().replace('\r\n', '\n').split('\n')]
        self.assertEqual([line[:9] for line in lines if ': train loss' in line], ['step  100', 'step  200'])
        curve = [line for line in lines if re.match(r' ?\d\.\d\d \|', line)]
        self.assertEqual(len(curve), 11)
        self.assertEqual(sum(line.count('o') for line in curve), 2)
        self.assertIn('.', curve[0])  # it starts high
        self.assertEqual(curve[0].index('.'), 7)


class Repository(unittest.TestCase):
    def test_shared_blocks(self):
        """Functions of the same name, and the parts that several scripts have in common, are equal word for word."""
        pieces = {}
        for script in ORDER:
            source = (HERE / script).read_text(encoding='utf-8')
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef) and node.name in (
                        'get_batch', 'evaluate', 'generate', 'plot', 'milliseconds'):
                    pieces.setdefault(node.name, {})[script] = ast.get_source_segment(source, node)
            for name, first, last in (('overrides', '# overrides', "__})?')\n"), ('device', 'gpus = ', "'cpu')\n"),
                                      ('data', '# -+ data\n', '# -+ model\n'), ('sampling', "idx = torch.tensor([encode", 'end=.*?\n')):
                found = re.search(f'^{first if "-+" in first else re.escape(first)}.*?{last if "+" in last or "*" in last else re.escape(last)}', source, re.M | re.S)
                if found:
                    pieces.setdefault(name, {})[script] = found[0]
        for name, versions in pieces.items():
            with self.subTest(name):
                self.assertEqual(len(set(versions.values())), 1, f'{name} differs between {", ".join(versions)}')
        self.assertGreaterEqual({name for name, versions in pieces.items() if len(versions) > 1},
                                {'overrides', 'device', 'data', 'get_batch', 'sampling'})

    def test_imports(self):
        for script in ORDER:
            tree = ast.parse((HERE / script).read_text(encoding='utf-8'))
            names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            self.assertLessEqual({name.split('.')[0] for name in names},
                                 set(sys.stdlib_module_names) | {'torch', 'tiktoken', 'numpy'}, script)

    def test_sections(self):
        """Every script has the sections of the others, in their order, and one setting a line with its comment."""
        for script in ORDER:
            source = (HERE / script).read_text(encoding='utf-8')
            self.assertEqual(re.findall(r'^# -{60,} (.+)$', source, re.M),
                             ['hyperparameters', 'data', 'model', 'training', 'sampling'], script)
            self.assertTrue(source.startswith('# /// script\n'))
            self.assertLessEqual(max(map(len, source.split('\n'))), 100, script)

    def test_readme(self):
        """Every command in the README runs (scaled down); every file that it names is there."""
        readme = (HERE / 'README.md').read_text(encoding='utf-8')
        commands = sorted(set(re.findall(r'^(?:python|uv run) (\w+\.py)( .*?)?(?: +#.*)?$', readme, re.M)))
        commands = [(script, settings) for script, settings in commands if script in SCRIPTS]
        self.assertGreaterEqual({script for script, _ in commands}, set(ORDER))
        small = {'bigram.py': ' --max_iters=2', 'gpt.py': ' --max_iters=2 --n_layer=1 --batch_size=2 --max_new_tokens=5'}
        fresh = [c for c in commands if '--resume' not in c[1]]
        for (script, settings), run in zip(fresh, runs(*((s, shell(a) + shell(small[s])) for s, a in fresh))):
            with self.subTest(f'{script}{settings}'):
                self.assertEqual((run.code, run.err), (0, ''))

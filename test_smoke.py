"""The smoke test: each script, used as people use it for a few steps, must learn and be right.

    python test_smoke.py                           all of it: no network, no GPU, under two minutes
    python test_smoke.py EveryScript.test_learns   one test
"""
import ast, collections, concurrent.futures, contextlib, functools, hashlib, http.server, io, math
import os, pathlib, re, shlex, signal, subprocess, sys, tempfile, threading, time, unittest
import torch
import torch.nn as nn
from torch.nn import functional as F

HERE = pathlib.Path(__file__).resolve().parent
# Each script with settings for a few steps; one more script joins by one more line.
SMALL = ('--device=cpu --batch_size=8 --block_size=16 --max_new_tokens=40 --max_iters=12 '
         '--eval_interval=4')
GPT = SMALL + (' --dtype=float32 --n_layer=2 --n_head=2 --n_embd=32 --warmup_iters=1 '
               '--learning_rate=0.01')
SCRIPTS = {
    'bigram.py': SMALL,
    'gpt.py': GPT + ' --dropout=0.1',
}
# what scales a command of the README down, behind the command's own settings
QUICK = {
    'bigram.py': ['--max_iters=2'],
    'gpt.py': ['--max_iters=2', '--batch_size=2', '--n_layer=1', '--max_new_tokens=9'],
}
ORDER = [name for name in ('bigram.py', 'gpt.py', 'addition_gpt.py', 'pretrain_finetune.py',
                           'modern_gpt.py', 'gpt2.py') if (HERE / name).exists()]
# 6,000 characters that a model can learn a little of in a dozen steps, with a few beyond ASCII
TEXT = ''.join(f'{who}:\nThe {a} sees the {b}, naïve “{a}” — {i % 7}.\n\n'
               for i in range(40) for who, a, b in (
    ('HAMLET', 'cat', 'moon'), ('FOOL', 'moon', 'king'), ('KING', 'fool', 'cat')))[:6000]
torch.set_num_threads(1)  # as in the runs below, so that results can be compared with theirs


def read(name):
    return (HERE / name).read_text(encoding='utf-8')


class Run:
    """One run of a script, alone in a folder of its own (or the one given) beside a text."""

    def __init__(self, script, settings='', folder=None, text=TEXT, edit=str, wait=True):
        self.folder = pathlib.Path(folder or tempfile.mkdtemp(dir=ROOT.name))
        if text is not None:
            text = text if isinstance(text, bytes) else text.encode()
            (self.folder / 'input.txt').write_bytes(text)
        (self.folder / script).write_text(edit(read(script)), encoding='utf-8')
        settings = settings.split() if isinstance(settings, str) else settings
        self.process = subprocess.Popen(
            [sys.executable, script, *settings], cwd=self.folder, env=ENV, encoding='utf-8',
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if wait:
            self.finish()

    def finish(self):
        self.out, self.err = self.process.communicate(timeout=100)
        self.code = self.process.returncode
        return self

    def losses(self):
        """[(step, train loss, val loss)] as printed."""
        line = r'^step +(\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4}), \d+\.\d s$'
        return [(int(step), float(train), float(val))
                for step, train, val in re.findall(line, self.out, re.M)]

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
    """A script as a notebook cell: constants edited, the kernel's argv, no __file__. Its output."""
    source = read(script)
    for name, value in constants.items():
        line = f'{name} = {value!r}'
        source, count = re.subn(rf'^{name} = .*$', lambda _: line, source, flags=re.M)
        assert count == 1, f'{script} has {count} lines "{name} = ..."'
    argv, where, handler = sys.argv, os.getcwd(), signal.getsignal(signal.SIGINT)
    sys.argv = ['/usr/lib/python3/site-packages/ipykernel_launcher.py', '-f', '/tmp/kernel.json']
    output = io.StringIO()
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
    return {name: ast.literal_eval(value) if value[0] in '0123456789TF' else value
            for name, value in pairs}


def setUpModule():
    global ROOT, ENV
    ROOT = tempfile.TemporaryDirectory()
    ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONIOENCODING='utf-8', no_proxy='*')


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
        """Alone beside a text: the loss starts near ln(vocabulary) and falls; twice the same."""
        for script, settings in self.each():
            a, b, c = runs((script, settings + ' --eval_interval=1'), (script, settings),
                           (script, settings + ' --seed=5'))
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
        """Pasted one after the other into one kernel: the same output as from the shell."""
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
                '--max_itres=5': 'do you mean --max_iters=', '--max_iters=many': '(int)',
                '--max_iters=1.5': '(int)', '--max_iters': '(int)', '--help': 'do you mean',
                '--batch_size=0': 'batch_size=0', '--temperature=0': 'temperature=0.0',
                '--device=cuda:9': 'device=cuda:9', '--prompt=[': "'['",
            }
            if 'n_embd' in settings:
                wrong |= {'--n_head=3': 'n_head=3', '--dropout=1': 'dropout=1.0',
                          '--dropout=some': '(float)', '--resume=yes': '(bool)',
                          '--resume=True': 'resume from', '--dtype=int3': 'dtype=int3'}
            results = runs(*((script, f'{settings} {setting}') for setting in wrong))
            for (setting, message), run in zip(wrong.items(), results):
                self.one_line(run, message, setting)

    def test_bad_text(self):
        for script, settings in self.each():
            empty, short, latin, fits = runs(
                *((script, settings, None, text) for text in (
                    '', 'to be', 'Caf\xe9 '.encode('latin-1') * 99, 'to be or\r\n' * 4)))
            self.one_line(empty, '0 characters')
            self.one_line(short, '5 characters')
            self.one_line(latin, 'UTF-8')
            self.assertEqual((fits.code, fits.err), (0, ''))

    def one_line(self, run, message, what=''):
        with self.subTest(what or message):
            self.assertEqual((run.code, run.err.count('\n')), (1, 1), run.err)
            self.assertIn(message, run.err)

    def test_download(self):
        """No input.txt: it is fetched whole, or not at all, and a line says what to do."""
        good = TEXT.encode()
        digest = hashlib.sha256(good).hexdigest()[:16]
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
                def edit(source):
                    source = source.replace('86c4e6aa9db7c042', digest)
                    return re.sub(r"'https://raw[^']+'", f"'http://127.0.0.1:{port}{path}'", source)
                return functools.partial(Run, script, settings, text=None, edit=edit)
            whole, damaged, short, missing, refused = together(
                *map(fetch, ('/good', '/damaged', '/short', '/missing')), fetch('/', port=1))
            self.assertEqual((whole.code, whole.err), (0, ''))
            self.assertEqual((whole.folder / 'input.txt').read_bytes(), good)
            for run, path in ((damaged, '/damaged'), (short, '/short'), (missing, '/missing'),
                              (refused, ':1/')):
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
        """The written-out softmax equals F.scaled_dot_product_attention, for all lengths."""
        g = self.gpt()
        attention = g['CausalSelfAttention']()
        for T in (16, 5, 1):
            x = torch.randn(3, T, 32)
            q, k, v = (z.view(3, T, 2, 16).transpose(1, 2)
                       for z in attention.c_attn(x).chunk(3, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            torch.testing.assert_close(attention(x), attention.c_proj(y.reshape(3, T, 32)))

    def test_causal(self):
        """Another later token changes no earlier logits, and does change its own."""
        for g in (self.gpt(), self.gpt(norm='post'),
                  self.gpt(norm='none', residual=False, mlp_width=0)):
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
            ('pre', True): lambda x, f, ln: x + f(ln(x)),
            ('post', True): lambda x, f, ln: ln(x + f(x)),
            ('none', True): lambda x, f, ln: x + f(x),
            ('none', False): lambda x, f, ln: f(x),
            ('pre', False): lambda x, f, ln: f(ln(x)),
            ('post', False): lambda x, f, ln: ln(f(x)),
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
        few = ' --device=cpu --max_iters=4 --eval_interval=4 --max_new_tokens=9'
        rungs = runs(*(('gpt.py', f'--rung={rung}{few}') for rung in range(2, 13)))
        parameters = []
        for run in rungs:
            self.assertEqual((run.code, run.err), (0, ''))
            parameters.append(int(re.search(r'([\d,]+) parameters', run.out)[1].replace(',', '')))
            self.assertEqual(len(run.losses()), 1)
        two, three, four, five, six, seven, eight, nine, ten, eleven, twelve = parameters
        self.assertTrue(two == three < four < five == six < seven < eight, parameters)
        self.assertTrue(eight < nine == ten < 2.8e5 < eleven < 3.3e5 < twelve, parameters)
        fits = rungs[1].checkpoint('gpt.pt')['must_fit']
        switches = [fits[k] for k in ('n_head', 'n_layer', 'mlp_width', 'residual', 'norm')]
        self.assertEqual(switches, [4, 1, 0, False, 'none'])
        run = Run('gpt.py', '--rung=9 --n_layer=1 --norm=post' + few)
        mixed = run.checkpoint('gpt.pt')['must_fit']
        switches = [mixed[k] for k in ('n_head', 'n_layer', 'mlp_width', 'residual', 'norm')]
        self.assertEqual(switches, [4, 1, 4, True, 'post'])
        for rung in (1, 13):
            self.assertIn(f'rung={rung}', Run('gpt.py', f'--rung={rung}').err)

    def test_evaluation(self):
        """The mean over every character but the first, whatever the batch; chance is left alone."""
        g = self.gpt(dropout=0.5)
        model, val, T = g['model'], g['val_data'], 16
        random = torch.get_rng_state()
        loss = g['evaluate']()
        self.assertTrue(torch.equal(random, torch.get_rng_state()))
        self.assertTrue(model.training)
        model.eval()
        with torch.no_grad():
            each = [F.cross_entropy(model(val[None, i:min(i + T, len(val) - 1)])[0][0],
                                    val[i + 1:i + T + 1], reduction='sum')
                    for i in range(0, len(val) - 1, T)]
        self.assertGreater((len(val) - 1) % T, 0)  # the last window is a short one
        self.assertAlmostEqual(loss, sum(each).item() / (len(val) - 1), places=5)
        self.assertEqual(loss, self.gpt(dropout=0.5, batch_size=3)['evaluate']())

    def test_sampling(self):
        """Past block_size; top_k and temperature as they should be; each token handed over."""
        g = self.gpt(dropout=0.5)
        model, idx, seen = g['model'].eval(), torch.zeros(2, 1, dtype=torch.long), []
        out = model.generate(idx, 40, top_k=1, on_token=seen.append)
        self.assertTrue(torch.equal(out, torch.cat([idx, *seen], dim=1)))
        for t in range(1, 41):  # greedy: each token is the likeliest one after the 16 before it
            likeliest = model(out[:, max(0, t - 16):t])[0][:, -1].argmax(dim=-1)
            self.assertTrue(torch.equal(out[:, t], likeliest))
        cold = model.generate(idx, 40, temperature=1e-4)
        self.assertTrue(torch.equal(out, cold))
        probabilities = F.softmax(model(idx[:1])[0][0, -1] / 2, dim=-1)
        many = idx[:1].repeat(2000, 1)
        three = model.generate(many, 1, temperature=2.0, top_k=3)[:, 1]
        self.assertEqual(set(three.tolist()), set(probabilities.topk(3).indices.tolist()))
        drawn = model.generate(many, 1, temperature=2.0)[:, 1]
        share = torch.bincount(drawn, minlength=g['vocab_size']) / 2000
        self.assertLess((share - probabilities).abs().max().item(), 0.05)

    def test_number_types(self):
        """bfloat16 and float16 (with loss scaling) learn what float32 learns, nearly."""
        names = ('float32', 'bfloat16', 'float16')
        kinds = runs(*(('gpt.py', f'{GPT} --dtype={name}') for name in names))
        losses = [[train for _, train, _ in run.losses()] for run in kinds]
        for kind, run, loss in zip(names, kinds, losses):
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
            lambda: Run('gpt.py', self.SETTINGS), lambda: self.stopped(signal.SIGKILL),
            lambda: self.stopped(signal.SIGINT))
        self.assertEqual([run.code for run in (whole, killed, stopped)], [0, -signal.SIGKILL, 0])
        self.assertEqual(stopped.err, '')
        end = whole.checkpoint('gpt.pt')
        self.assertEqual(end['step'], 300)
        self.assertEqual(len(stopped.out.split('-' * 64 + '\n')[1]), 41)  # saved, and a sample
        at = [run.checkpoint('gpt.pt')['step'] for run in (killed, stopped)]
        self.assertTrue(0 < at[0] < 300 and 0 < at[1] < 300, at)
        self.assertEqual(stopped.losses()[-1][0], at[1])
        resumed = runs(*(('gpt.py', self.SETTINGS + ' --resume=True', run.folder)
                         for run in (killed, stopped)))
        for run, step in zip(resumed, at):
            self.assertIn(f'resumed from gpt.pt after step {step}\n', run.out)
        self.same(resumed[0].checkpoint('gpt.pt')['val_losses'], end['val_losses'], 'val_losses')
        self.equal(resumed[0].checkpoint('gpt.pt'), end)
        a, b = resumed[1].checkpoint('gpt.pt'), end
        for key in ('model', 'optimizer', 'losses', 'random'):  # it has one more evaluation
            self.same(a[key], b[key], key)
        self.assertEqual(resumed[0].out.split('-' * 64)[1], whole.out.split('-' * 64)[1])

        before = (whole.folder / 'gpt.pt').read_bytes()
        sample = self.SETTINGS + ' --resume=True --max_iters=0 --top_k=1 --prompt='
        only = runs(*(('gpt.py', sample + prompt, whole.folder) for prompt in ('HAMLET:', 'The')))
        self.assertEqual((whole.folder / 'gpt.pt').read_bytes(), before)
        for run, prompt in zip(only, ('HAMLET:', 'The')):
            self.assertEqual((run.code, run.err, run.losses()), (0, '', []))
            self.assertTrue(run.out.split('-' * 64 + '\n')[1].startswith(prompt))

    def test_best_weights(self):
        """Where the loss rises again, the best weights are kept and used to sample."""
        text = 'to be or not ' * 400 + 'KING' * 150  # the more it learns, the less it expects him
        run = Run('gpt.py', GPT, text=text)
        saved = run.checkpoint('gpt.pt')
        (loss, step), (last_loss, last_step) = min(saved['val_losses']), saved['val_losses'][-1]
        self.assertLess(step, last_step)
        self.assertEqual(saved['step'], last_step)
        self.assertIn(f'best val loss {loss:.4f} (step {step})', run.out)
        namespace = {'__name__': '__main__'}
        cell('gpt.py', namespace, run.folder, **constants(GPT) | {'max_iters': 0, 'resume': True})
        self.assertAlmostEqual(namespace['evaluate'](), loss, places=6)
        namespace['model'].load_state_dict(saved['model'])
        self.assertAlmostEqual(namespace['evaluate'](), last_loss, places=6)

    def test_unfit(self):
        """A checkpoint that is damaged or of something else gets its line, and stays as it is."""
        settings = SCRIPTS['gpt.py'] + ' --max_iters=1'
        run = Run('gpt.py', settings)
        good = (run.folder / 'gpt.pt').read_bytes()
        other = io.BytesIO()
        torch.save({'must_fit': {'script': 'other.py'}}, other)
        weights = io.BytesIO()
        torch.save(nn.Linear(2, 2).state_dict(), weights)
        for contents, setting, message in (
                *((damaged, '', 'cannot resume from gpt.pt') for damaged in (
                    good[:len(good) // 2], b'', b'hello', weights.getvalue())),
                (other.getvalue(), '', "script='other.py'"), (good, ' --n_layer=3', 'n_layer=2'),
                (good, ' --norm=post --n_head=4', "n_head=2, norm='pre'")):
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
        run = Run('gpt.py', SCRIPTS['gpt.py'] + ' --learning_rate=1e30 --grad_clip=1e30')
        self.assertEqual((run.code, run.err.count('\n')), (1, 1), run.err)
        self.assertRegex(run.err, r'step \d+: the loss is (nan|inf): try a lower learning_rate')


class Terminal(unittest.TestCase):
    @unittest.skipUnless(hasattr(os, 'openpty'), 'needs a pseudo-terminal')
    def test_progress(self):
        """In a terminal one line refreshes in place; evaluations and the curve are as in a pipe."""
        folder = tempfile.mkdtemp(dir=ROOT.name)
        pathlib.Path(folder, 'input.txt').write_text(TEXT, encoding='utf-8')
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
        evaluations = [line[:9] for line in lines if ': train loss' in line]
        self.assertEqual(evaluations, ['step  100', 'step  200'])
        curve = [line for line in lines if re.match(r' ?\d\.\d\d \|', line)]
        self.assertEqual(len(curve), 11)
        self.assertEqual(sum(line.count('o') for line in curve), 2)
        self.assertEqual(curve[0][7], '.')  # it starts at the top left


class Repository(unittest.TestCase):
    def test_shared_blocks(self):
        """What several scripts have in common is in each of them word for word the same."""
        blocks = {  # from the first of the two to the second
            'device': ('gpus = ', 'else next('), 'overrides': ('# overrides', '__name__})?'),
            'data': ('source = ', '\n# -----'), 'sampling': ('idx = torch.tensor(', 'print()')}
        shared = collections.defaultdict(dict)
        for script in ORDER:
            source = read(script)
            for name, (first, last) in blocks.items():
                start = source.find('\n' + first)
                if start >= 0:
                    shared[name][script] = source[start:source.index(last, start)]
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef) and node.name not in ('__init__', 'forward'):
                    shared[node.name][script] = ast.get_source_segment(source, node)
        for name, versions in shared.items():
            with self.subTest(name):
                self.assertEqual(len(set(versions.values())), 1, ' and '.join(versions))
        several = {name for name, versions in shared.items() if len(versions) > 1}
        self.assertGreaterEqual(several, {*blocks, 'get_batch', 'generate'})

    def test_imports(self):
        for script in ORDER:
            nodes = list(ast.walk(ast.parse(read(script))))
            names = {alias.name for node in nodes if isinstance(node, ast.Import)
                     for alias in node.names}
            names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            allowed = {*sys.stdlib_module_names, 'torch', 'tiktoken', 'numpy'}
            self.assertLessEqual({name.split('.')[0] for name in names}, allowed, script)

    def test_sections(self):
        """Every script has the sections of the others, in their order."""
        for script in ORDER:
            source = read(script)
            self.assertEqual(re.findall(r'^# -{60,} (.+)$', source, re.M),
                             ['hyperparameters', 'data', 'model', 'training', 'sampling'], script)
            self.assertTrue(source.startswith('# /// script\n'))
            self.assertLessEqual(max(map(len, source.split('\n'))), 100, script)

    def test_readme(self):
        """Every command in the README runs (scaled down by more settings behind its own)."""
        readme = read('README.md')
        commands = [shlex.split(line, comments=True)[1:] for line in
                    sorted(set(re.findall(r'^(?:python|uv run) \w+\.py.*$', readme, re.M)))]
        commands = [command for command in commands if command[0] != 'test_smoke.py']
        self.assertEqual({script for script, *_ in commands}, set(ORDER))

        def scaled_down(script, *settings):
            if '--resume=True' not in settings:
                return Run(script, [*settings, *QUICK[script]])
            first = Run(script, SCRIPTS[script])
            return Run(script, [*SCRIPTS[script].split(), *settings], first.folder)

        results = together(*(functools.partial(scaled_down, *command) for command in commands))
        for command, run in zip(commands, results):
            with self.subTest(' '.join(command)):
                self.assertEqual((run.code, run.err), (0, ''))


if __name__ == '__main__':
    unittest.main()

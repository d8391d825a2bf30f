"""The smoke test: every script, used as people use it, learns for a few steps on the CPU.

    python test_smoke.py                     all of it: no network, no GPU, half a minute
    python test_smoke.py Smoke.test_shell    one test

The tests in .ci/ look deeper: do the models compute their formulas, is the loss exact, do
damaged downloads and killed runs leave whole files, and so on.
"""
import atexit, contextlib, io, json, math, os, pathlib, re, shlex, shutil, signal, subprocess
import sys, tempfile, types, unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

os.environ.update(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', PYTHONIOENCODING='utf-8')
HERE = pathlib.Path(__file__).resolve().parent
ROOT = tempfile.TemporaryDirectory()  # all files go there
atexit.register(ROOT.cleanup)

# 6,000 characters, some beyond ASCII, of which a dozen steps can learn a little
NOUNS = ('HAMLET', 'cat', 'moon'), ('FOOL', 'moon', 'king'), ('KING', 'fool', 'cat')
TEXT = ''.join(f'{who}:\nThe {a} sees the {b}, naïve “{a}” — {i % 7}.\n\n'
               for i in range(40) for who, a, b in NOUNS)
SCRIPTS = ('bigram.py', 'gpt.py', 'addition_gpt.py', 'pretrain_finetune.py', 'modern_gpt.py',
           'gpt2.py')
VOCABULARY = {'addition_gpt.py': 12, 'gpt2.py': 300}  # the others: the characters of TEXT
# settings for a few steps; each script takes those that it has
SMALL = ('--device=cpu --batch_size=8 --block_size=16 --n_layer=2 --n_head=2 --n_embd=32 '
         '--dropout=0.1 --max_iters=12 --eval_interval=4 --learning_rate=0.01 '
         f'--warmup_ratio={1 / 12} --max_new_tokens=40 --vocab_size=300 '
         '--total_batch_size=128 --n_digits=2 --test_digits=3 --corpus=corpus.txt '
         '--pretrain_max_iters=12 --pretrain_learning_rate=0.01 --finetune_learning_rate=0.01 '
         f'--cache_dir={ROOT.name}/cache')
# and for two; behind a command's own settings they win
TINY = (SMALL + ' --batch_size=2 --n_layer=1 --max_iters=2 --pretrain_max_iters=2 '
        '--max_new_tokens=9 --total_batch_size=32 --dataset=input.txt --use_compile=False')
KERNEL = ['/usr/lib/python3/site-packages/ipykernel_launcher.py', '-f', '/tmp/kernel.json']

def read(name):
    return (HERE / name).read_text(encoding='utf-8')

def constants(script):
    """The names of its hyperparameters."""
    return re.findall(r'^(\w+) = ', read(script).split('\ndef override')[0], re.M)

def fit(script, settings):
    """Those of the settings that the script has."""
    return ' '.join(setting for setting in settings.split()
                    if setting[2:].split('=')[0] in constants(script))

def folder_with(text):
    """A new folder with the text (a string or bytes) as input.txt, and the same backwards, which
    shares no passage with it, as corpus.txt. None: an empty folder."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=ROOT.name))
    if text is not None:
        text = text if isinstance(text, bytes) else text.encode()
        (folder / 'input.txt').write_bytes(text)
        corpus = text.decode('utf-8', errors='replace')[::-1]
        (folder / 'corpus.txt').write_text(corpus, encoding='utf-8')
    return folder

def shell(script, settings):
    """The script as its own process, alone in a folder with a text."""
    folder = folder_with(TEXT)
    shutil.copy(HERE / script, folder)
    run = subprocess.run([sys.executable, script, *shlex.split(settings)], cwd=folder,
                         capture_output=True, timeout=100)
    return types.SimpleNamespace(code=run.returncode, out=run.stdout.decode(),
                                 err=run.stderr.decode())

def execute(script, settings='', folder=None, names=None, screen=None, cell=False):
    """Run the script in this process, which is faster. Returns folder, out, names (its globals),
    message (of the error that ended it, or 'fine') and handler (of Ctrl-C, afterwards). A cell of
    a notebook has no file, the kernel's arguments, and its settings edited in the source."""
    folder = folder or folder_with(TEXT)
    names = {} if names is None else names
    screen = screen or io.StringIO()
    source, path, argv = read(script), str(HERE / script), [script, *shlex.split(settings)]
    if cell:
        for setting in settings.split():
            name, value = setting[2:].split('=')
            value = value if re.fullmatch(r'[\d.]+|True|False', value) else repr(value)
            source = re.sub(rf'(?m)^{name} = .*', f'{name} = {value}', source, count=1)
        path, argv = '<cell>', KERNEL
    else:
        names['__file__'] = path
    names['__name__'] = '__main__'
    message = 'fine'
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(screen), mock.patch('sys.argv', argv):
            exec(compile(source, path, 'exec'), names)
    except SystemExit as error:
        message = str(error.code)
    except Exception as error:
        message = f'{type(error).__name__}: {error}'
    finally:
        os.chdir(before)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    return types.SimpleNamespace(folder=folder, out=screen.getvalue(), names=names,
                                 message=message, handler=handler)

class Screen(io.StringIO):
    """A stdout that calls the action once, as soon as the pattern has been printed."""

    def __init__(self, pattern, action):
        super().__init__()
        self.pattern, self.action = re.compile(pattern, re.M | re.S), action

    def write(self, text):
        super().write(text)
        if self.action and self.pattern.search(self.getvalue()):
            action, self.action = self.action, None
            action()

def losses(out):
    """[(step, train loss, val loss)] as printed."""
    line = r'^step +(\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})'
    return [(int(step), float(train), float(val))
            for step, train, val in re.findall(line, out, re.M)]

def sample(out):
    """What a run writes at its end, after the last line of dashes."""
    return out[out.rindex('-' * 64 + '\n') + 65:]

def interrupt():
    signal.raise_signal(signal.SIGINT)  # Ctrl-C

def without_seconds(out):
    return re.sub(r'\d+\.\d s', '', out)

class Smoke(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        """Each script as its own process; two at a time, as there are two cores."""
        cls.settings = {one: fit(one, SMALL + ' --eval_interval=1') for one in SCRIPTS}
        with ThreadPoolExecutor(2) as pool:
            cls.runs = dict(zip(SCRIPTS, pool.map(shell, SCRIPTS, cls.settings.values())))

    def test_shell(self):
        """The loss starts near ln(vocabulary) and falls; the model writes something."""
        for script, run in self.runs.items():
            with self.subTest(script):
                self.assertEqual((run.code, run.err), (0, ''))
                curve = losses(run.out)[-12:]  # the last stage, which begins from nothing
                self.assertEqual([step for step, *_ in curve], [*range(1, 13)])
                guessing = math.log(VOCABULARY.get(script, len(set(TEXT))))
                # untrained, the model of addition_gpt.py repeats each token
                near = 1.0 if script == 'addition_gpt.py' else 0.35
                self.assertAlmostEqual(curve[0][1], guessing, delta=near)
                self.assertLess(curve[-1][2], curve[0][2] - 0.1)
                self.assertGreater(len(sample(run.out)), 20)

    def test_cells(self):
        """Scripts pasted one after another into one kernel print the same; Ctrl-C works again."""
        names = {}
        for script, run in self.runs.items():
            with self.subTest(script):
                pasted = execute(script, self.settings[script], names=names, cell=True)
                self.assertEqual(pasted.message, 'fine')
                self.assertIs(pasted.handler, signal.default_int_handler)
                self.assertEqual(without_seconds(pasted.out), without_seconds(run.out))

    def test_bad_settings(self):
        """A setting that is wrong is named before training."""
        for script, setting, message in (
                ('bigram.py', '--max_itres=5', 'max_itres'),
                ('gpt.py', '--prompt=a[', 'prompt'),
                ('addition_gpt.py', '--problem=1+x', 'problem'),
                ('pretrain_finetune.py', '--corpus=no.txt', 'no.txt'),
                ('modern_gpt.py', '--n_head=3', 'n_head (3)'),
                ('gpt2.py', '--temperature=0', 'above 0')):
            with self.subTest(f'{script} {setting}'):
                run = execute(script, f'{self.settings[script]} {setting}')
                self.assertIn(message, run.message)
                self.assertEqual(losses(run.out), [])

    def test_resume(self):
        """A run stopped by Ctrl-C and resumed has the losses of one that was never stopped, and
        was evaluated more often."""
        for script in 'gpt.py', 'pretrain_finetune.py', 'modern_gpt.py', 'gpt2.py':
            with self.subTest(script):
                settings = fit(script, SMALL)
                often = losses(self.runs[script].out)
                whole = [one for one in often if one[0] % 4 == 0]
                stopped = execute(script, settings, screen=Screen('^ +6 ', interrupt))
                resumed = execute(script, settings + ' --resume', stopped.folder)
                self.assertLess(len(losses(stopped.out)), len(whole))
                self.assertEqual(losses(stopped.out) + losses(resumed.out), whole)

    def test_commands(self):
        """Every command of the README and the docstrings runs (two steps of a tiny model); every
        setting that they mention exists."""
        text = '\n'.join(map(read, ('README.md', *SCRIPTS)))
        text = re.sub(r'\s*\\\n\s*', ' ', text)  # a command of several lines
        command = r'(?:python|uv run|torchrun.*) (\w+\.py)((?: --\w+(?:="[^"]*"|=[^\s`]*)?)*)'
        commands = {*re.findall(command, text)} - {('test_smoke.py', '')}
        self.assertEqual({script for script, _ in commands}, {*SCRIPTS})
        # what gpt2.py would download: weights, and questions
        export = execute('gpt2.py', fit('gpt2.py', TINY) + ' --export=mine').folder / 'mine'
        row = {'ctx': 'The king', 'label': 1, 'endings': ['sees', 'is', 'the', 'fool']}
        os.makedirs(f'{ROOT.name}/cache', exist_ok=True)
        pathlib.Path(ROOT.name, 'cache', 'hellaswag_val.jsonl').write_text(json.dumps(row))
        for script, settings in sorted(commands):
            with self.subTest(script + settings):
                tiny, earlier = fit(script, TINY), None
                if 'resume' in settings:  # it needs something to continue
                    where = ' '.join(re.findall(r'--checkpoint=\S+', settings))
                    earlier = execute(script, f'{tiny} {where}').folder
                if '--max_iters=0' in settings:
                    tiny = re.sub(r'--max_iters=\d+', '', tiny)
                settings = settings.replace('init_from=gpt2', f'init_from={export}')
                ended = execute(script, f'{settings} {tiny}', earlier)
                self.assertEqual(ended.message, 'fine')
        mentioned = ' '.join(re.findall(r'`(--[^`\n]+)`', text))
        self.assertLessEqual({*re.findall(r'--(\w+)', mentioned)},
                             {name for script in SCRIPTS for name in constants(script)})


if __name__ == '__main__':
    unittest.main()

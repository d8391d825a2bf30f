"""What surrounds a model: settings, texts, downloads, checkpoints, screens; equal blocks."""
import ast, collections, contextlib, io, re, unittest
from unittest import mock
from common import (SCRIPTS, SMALL, TEXT, TEXTUAL, UNIQUE, Server, execute, fit, folder_with,
                    losses, read, run, sample)

DIFFER = {  # functions that a script has in a form of its own
    'get_batch': 'addition_gpt.py pretrain_finetune.py modern_gpt.py gpt2.py',
    'evaluate': 'bigram.py addition_gpt.py pretrain_finetune.py gpt2.py',
    'save': 'addition_gpt.py modern_gpt.py gpt2.py', 'fetch': 'gpt2.py',
    'Block.forward': 'addition_gpt.py modern_gpt.py gpt2.py',  # with columns, with a cache
    '': 'addition_gpt.py modern_gpt.py gpt2.py'}  # all other parts of the model

def functions(node, prefix=''):
    """{name: source without comments} of the functions in a script, and of 'Class.method'."""
    found = {}
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            found[prefix + child.name] = ast.unparse(child)
        elif isinstance(child, ast.ClassDef):
            found |= functions(child, f'{child.name}.')
        elif isinstance(child, ast.If):
            found |= functions(child)
    return found

class Files(unittest.TestCase):
    def test_shared_blocks(self):
        """A function that several scripts share is the same in all of them."""
        versions = collections.defaultdict(dict)
        for script in SCRIPTS:
            for name, source in functions(ast.parse(read(script))).items():
                own = DIFFER.get(name, DIFFER[''] if '.' in name else '')
                if script not in own:
                    versions[name][source] = script
        for name, scripts in versions.items():
            self.assertEqual(len(scripts), 1, f'{name}: {[*scripts.values()]}')

    def test_bad_settings(self):
        """A setting is set or refused, with a message that names it, before training."""
        rows = [(SCRIPTS, *row) for row in (
            ('--max_itres=5', 'max_itres'), ('--max_iters=1.5', '1.5'), ('-h', '    python '),
            ('max_iters=3', 'max_iters'), ('--max_iters 3', '--max_iters='))]
        rows += [(TEXTUAL, '--prompt=a[', 'prompt'), (TEXTUAL, '--temperature=0', 'temperature')]
        rows += [([script], settings, message) for script, settings, message in (
            ('bigram.py', '--n_head=3', 'n_head'), ('gpt.py', '--resume=yes', 'True or False'),
            ('gpt.py', '--rung=1', 'bigram.py'), ('gpt.py', '--rung=13', 'rung'),
            ('gpt.py', '--gpu=True', '--gpu'), ('gpt.py', '--resume --checkpoint=no.pt', 'no.pt'),
            ('gpt.py', '--n_head=3', 'n_head'), ('gpt.py', '--checkpoint=out/gpt.pt', 'out/'),
            ('gpt.py', '--dropout=2', 'dropout'), ('gpt.py', '--dtype=float17', 'float17'),
            ('addition_gpt.py', '--position=last', "'coupled' or 'learned'"),
            ('addition_gpt.py', '--position=learned --problem=1+' + '2' * 43, 'block_size=131'),
            ('addition_gpt.py', '--position=learned --block_size=13', 'block_size=14'),
            ('pretrain_finetune.py', '--resume', 'pretrained_gpt.pt'),
            ('modern_gpt.py', '--n_kv_head=3', 'n_kv_head (3)'),
            ('modern_gpt.py', '--activation=tanh', 'relu2'),
            ('modern_gpt.py', '--n_embd=30', 'rotary'), ('gpt2.py', '--top_p=0', 'top_p'),
            ('gpt2.py', '--total_batch_size=200', 'multiple of 128'),
            ('gpt2.py', '--vocab_size=200', '257'), ('gpt2.py', '--n_head=3', 'n_head'),
            ('gpt2.py', '--init_from=GPT2', 'gpt2-xl'),
            ('gpt2.py', '--resume --checkpoint=no.pt', 'no.pt'))]
        rows += [(['addition_gpt.py'], f"'--problem={problem}'", 'problem: two numbers')
                 for problem in ('12', '1+2+3', '-1+2', '1 + 2', '1+２', '0x1+2')]
        for scripts, settings, message in rows:
            for script in scripts:
                with self.subTest(f'{script} {settings}'):
                    ended = execute(script, f'{fit(script, SMALL)} {settings}')
                    self.assertNotEqual(ended.message, 'fine')
                    self.assertIn(message, ended.message)
                    self.assertEqual(losses(ended.out), [])
                    self.assertEqual([*ended.folder.glob('*.pt')], [])

    @unittest.expectedFailure
    def test_edited_constants(self):
        """A constant that is edited is obeyed, on a machine with a GPU, too."""
        for script in SCRIPTS:
            with (mock.patch('torch.cuda.is_available', return_value=True),
                  mock.patch('torch.cpu.get_capabilities', return_value={'avx512_bf16': True})):
                edited = fit(script, f'{SMALL} --dtype=float32')
                names = execute(script, edited, cell=True).names
            self.assertEqual((names['device'], names.get('dtype')),
                             ('cpu', 'float32' if 'dtype' in edited else None), script)

    def test_texts(self):
        """Odd texts that are right, and those that end in a message."""
        for script in [*TEXTUAL, 'gpt2.py']:
            for text, message in (('', 'needs 161'), ('to be', 'needs 161'), (UNIQUE * 5, 'fine'),
                                  ('Caf\xe9'.encode('latin-1') * 99, 'utf-8'),
                                  ('a' * 20000, 'fine'), ('\ufeff' + 'to be\r\n' * 400, 'fine')):
                if script == 'gpt2.py':
                    message = message.replace('needs 161', 'is too short')
                ended = run(script, '--vocab_size=257', folder_with(text))
                self.assertIn(message, ended.message)
            if script != 'gpt2.py':  # of the last text: no byte-order mark, no CR
                self.assertEqual(ended.names['chars'], sorted('to be\n'))

    def test_download(self):
        """Where input.txt is missing it is downloaded: whole or not at all."""
        page = '/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
        for script in [*TEXTUAL, 'gpt2.py']:
            for bodies, broken, message in (({page: TEXT.encode()}, [page], 'incomplete'),
                                            ({}, [], '404'), ({page: TEXT.encode()}, [], 'fine')):
                folder = folder_with(TEXT)  # with a corpus
                (folder / 'input.txt').unlink()
                with Server(bodies, broken) as server:
                    ended = run(script, '', folder)
                self.assertIn(message, ended.message.lower())
                self.assertIn(page, ended.out)  # it says from where
                got = [path.read_bytes() for path in folder.glob('input.txt*')]
                self.assertEqual(got, [TEXT.encode()] if message == 'fine' else [])
        with server.patch:  # which has gone
            self.assertIn('URLError', run('gpt.py', '', folder_with(None)).message)

    def test_checkpoints(self):
        """Sizes are the checkpoint's; what doesn't fit it is refused, and it stays whole."""
        folder = run('gpt.py').folder
        sizeless = '--device=cpu --dtype=float32 --batch_size=8 --eval_interval=4 --resume'
        names = execute('gpt.py', f'{sizeless} --max_iters=14', folder).names
        self.assertEqual([names['n_layer'], names['n_embd'], names['block_size']], [2, 32, 16])
        good = (folder / 'gpt.pt').read_bytes()
        rows = (  # settings, contents of gpt.pt, text, part of the message
            ('--n_layer=3', good, TEXT, "'n_layer': 2"), ('--n_head=4', good, TEXT, 'n_head'),
            ('--rung=9 --checkpoint=gpt.pt', good, TEXT, 'rung'), ('', b'', TEXT, 'Error'),
            ('', good[:9999], TEXT, 'Error'), ('', good, 'to be ' * 99, 'other'),
            ('', good, None, 'input.txt that gpt.pt was trained on'))
        for setting, contents, text, message in rows:
            with self.subTest(message):
                other = folder_with(text)
                (other / 'gpt.pt').write_bytes(contents)
                ended = execute('gpt.py', f'{sizeless} {setting}', other)
                self.assertIn(message, ended.message)
                self.assertEqual((other / 'gpt.pt').read_bytes(), contents)
        run('gpt.py', '', folder)  # a new run leaves the old one beside it
        self.assertEqual((folder / 'gpt.pt.old').read_bytes(), good)

    def test_screens(self):
        """Letters that stdout can't show become '?'; no stdout at all is no error."""
        folder = folder_with('тоже 日本 ' * 200)
        shown = io.TextIOWrapper(io.BytesIO(), 'ascii')
        for stdout in shown, None:
            with mock.patch('sys.stdout', stdout), mock.patch('contextlib.redirect_stdout'):
                self.assertEqual(run('gpt.py', '', folder).message, 'fine')
        self.assertIn('?', sample(shown.buffer.getvalue().decode()))

    def test_readme(self):
        """The code that the README quotes is the scripts' own; what it runs, runs."""
        readme = read('README.md')
        names = run('gpt.py', '--block_size=64 --n_head=4', folder_with(read('input.txt'))).names
        for quoted in re.findall(r'^```python\n(.*?)^```', readme, re.M | re.S):
            if 'print(' in quoted:
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(quoted, names)
                self.assertGreater(len(out.getvalue()), 60)
            else:
                for line in quoted.splitlines():
                    self.assertTrue(any(line + '\n' in read(script) for script in SCRIPTS), line)

"""What surrounds a model: settings, texts, downloads, checkpoints, screens; equal blocks."""
import ast, contextlib, io, re, subprocess, sys, unittest
from unittest import mock
from common import (SCRIPTS, SHAKESPEARE, SMALL, TEXT, TEXTUAL, UNIQUE, UNTRAINED, execute, fit,
                    folder_with, losses, read, run, sample, serve)

DIFFER = {  # functions that a script has in a form of its own
    'get_batch': 'addition_gpt.py pretrain_finetune.py modern_gpt.py gpt2.py',
    'evaluate': 'bigram.py addition_gpt.py gpt2.py', 'save': 'modern_gpt.py gpt2.py',
    'sample': 'bigram.py gpt2.py',
    '': 'addition_gpt.py modern_gpt.py gpt2.py'}  # all parts of the model

class Files(unittest.TestCase):
    def test_shared_blocks(self):
        """A function that several scripts share is the same in all of them."""
        versions = {}  # of a function or of 'Class.method': {source without comments: script}
        for script in SCRIPTS:
            for parent in ast.walk(ast.parse(read(script))):
                for child in ast.iter_child_nodes(parent):
                    if isinstance(child, ast.FunctionDef):
                        name = f'{getattr(parent, "name", "")}.{child.name}'.lstrip('.')
                        own = DIFFER.get(name, DIFFER[''] if '.' in name else '').split()
                        if script not in own:
                            versions.setdefault(name, {})[ast.unparse(child)] = script
        for name, scripts in versions.items():
            self.assertEqual(len(scripts), 1, f'{name}: {[*scripts.values()]}')

    def test_bad_settings(self):
        """A setting is set or refused, with a message that names it, before training."""
        rows = [(script, *row) for script in TEXTUAL for row in (
            ('--prompt=a[', 'prompt'), ('--temperature=0', 'temperature'))]
        rows += [('gpt.py', *row) for row in (
            ('--max_itres=5', 'max_itres'), ('--max_iters=1.5', '1.5'), ('-h', '    python '),
            ('max_iters=3', 'max_iters'), ('--max_iters 3', '--max_iters='),
            ('--resume=yes', 'True or False'), ('--rung=1', 'bigram.py'), ('--rung=13', 'rung'),
            ('--n_head=3', 'n_head'), ('--checkpoint=out/gpt.pt', 'out/'),
            ('--resume --checkpoint=no.pt', 'no.pt'), ('--checkpoint=.', 'not a file'),
            ('--top_k=0.5', 'top_k = 1.0'), ('--max_iters=many', 'max_iters'),
            ('--learning_rate=1e30 --grad_clip=0', 'rate'),  # seen in training
            ('--learning_rate=30 --warmup_ratio=0 --eval_interval=1', 'rate'))]
        rows += [('addition_gpt.py', f"'--problem={problem}'", 'problem: two numbers')
                 for problem in ('12', '1+2+3', '-1+2', '1 + 2', '1+２', '0x1+2')]
        rows += [
            ('addition_gpt.py', '--position=last', "'coupled' or 'learned'"),
            ('addition_gpt.py', '--order=plain', '--position=learned'),
            ('addition_gpt.py', '--order=last', 'scratchpad'),
            ('addition_gpt.py', '--problem=1+' + '2' * 301, '300 digits'),
            ('addition_gpt.py', '--position=learned --problem=1+' + '2' * 43, 'block_size=131'),
            ('pretrain_finetune.py', '--resume', 'pretrained_gpt.pt'),
            ('modern_gpt.py', '--n_kv_head=3', 'n_kv_head'),
            ('modern_gpt.py', '--n_embd=30', 'rotary'),
            ('modern_gpt.py', '--activation=tanh', 'relu2'), ('gpt2.py', '--top_p=0', 'top_p'),
            ('gpt2.py', '--total_batch_size=200', 'multiple of 128'),
            ('gpt2.py', '--vocab_size=200', '257'), ('gpt2.py', '--init_from=GPT2', 'gpt2-xl')]
        for script, settings, message in rows:
            with self.subTest(f'{script} {settings}'):
                ended = execute(script, f'{fit(script, SMALL)} {settings}')
                self.assertNotEqual(ended.message, 'fine')
                self.assertIn(message, ended.message)
                self.assertEqual((losses(ended.out), [*ended.folder.glob('*.pt')]), ([], []))

    def test_edited_constants(self):
        """A constant that is edited is obeyed, on a machine with a GPU, too."""
        for script in SCRIPTS:
            edited = fit(script, f'{SMALL} --dtype=float32')
            with (mock.patch('torch.cuda.is_available', return_value=True),
                  mock.patch('torch.cpu.get_capabilities', create=True,
                             return_value={'avx512_bf16': True})):
                names = execute(script, edited, cell=True).names
            self.assertEqual((names['device'], names.get('dtype')),
                             ('cpu', 'float32' if 'dtype' in edited else None), script)

    def test_import(self):
        """Imported by another program, a script leaves that program's arguments alone."""
        folder = folder_with(TEXT)
        (folder / 'bigram.py').write_text(read('bigram.py'), encoding='utf-8')
        command = [sys.executable, '-c', 'import bigram', '--max_itres=5']
        done = subprocess.run(command, cwd=folder, capture_output=True)
        self.assertEqual((done.returncode, done.stderr), (0, b''))

    def test_texts(self):
        """Odd texts that are right, and those that end in a message."""
        for script in [*TEXTUAL, 'gpt2.py']:
            short = '161|short'
            for text, message in (('', short), ('to be', short), (UNIQUE * 5, 'fine'),
                                  ('Caf\xe9'.encode('latin-1') * 99, 'utf-8'),
                                  ('a' * 20000, 'fine|validation text'),
                                  ('\ufeff' + 'to be\r\n' * 400, 'fine')):
                ended = run(script, '--vocab_size=257', folder_with(text))
                self.assertRegex(ended.message, message)
            if script != 'gpt2.py':  # of the last text: no byte-order mark, no CR
                self.assertEqual(ended.names['chars'], sorted('to be\n'))
        names = run('gpt.py', UNTRAINED, folder_with('to be ' * 2_000_000)).names
        self.assertEqual(len(names['val_data']), 1_000_000)

    def test_download(self):
        """Where input.txt is missing it is downloaded: whole or not at all."""
        for script in [*TEXTUAL, 'gpt2.py']:
            for page, broken, message in ((SHAKESPEARE, [SHAKESPEARE], 'incomplete'),
                                          ('/other', [], '404'), (SHAKESPEARE, [], 'fine')):
                folder = folder_with(TEXT)  # with a corpus
                (folder / 'input.txt').unlink()
                with serve({page: TEXT.encode()}, broken):
                    ended = run(script, '', folder)
                self.assertIn(message, ended.message.lower())
                self.assertIn(SHAKESPEARE, ended.out)  # it says from where
                got = [path.read_bytes() for path in folder.glob('input.txt')]
                self.assertEqual(got, [TEXT.encode()] if message == 'fine' else [])

    def test_checkpoints(self):
        """Sizes are the checkpoint's; what doesn't fit it is refused, and it stays whole."""
        folder = run('gpt.py').folder
        sizeless = '--device=cpu --dtype=float32 --batch_size=8 --eval_interval=4 --resume'
        names = execute('gpt.py', f'{sizeless} --max_iters=14', folder).names
        self.assertEqual([names['n_layer'], names['n_embd'], names['block_size']], [2, 32, 16])
        good = (folder / 'gpt.pt').read_bytes()
        run('gpt.py', '--max_iters=0', folder)  # trains nothing, renames nothing
        self.assertEqual((folder / 'gpt.pt').read_bytes(), good)
        # killed while it saves, or after a resume before it saves again
        for script in 'gpt.py', 'pretrain_finetune.py', 'modern_gpt.py', 'gpt2.py':
            saved = run(script).folder
            before = {path: path.read_bytes() for path in saved.glob('*.pt')}
            def killed(_, path):
                with open(path, 'wb') as file:
                    file.write(b'half')
                sys.exit('killed')
            with mock.patch('torch.save', killed):
                ended = run(script, '--resume --max_iters=16', saved)
            self.assertEqual(ended.message, 'killed')
            again = [path for path in before if script != 'pretrain_finetune.py'
                     or path.stem in ('pretrained_gpt', 'finetuned_gpt')]  # later ones train anew
            self.assertEqual([path.read_bytes() for path in again],
                             [before[path] for path in again])
        for settings, text, message in (
                ('--n_head=4', TEXT, 'n_head'), ('--rung=9 --checkpoint=gpt.pt', TEXT, 'rung'),
                ('', TEXT[9:] + TEXT[:9], 'gpt.pt'),  # in the same characters
                ('', None, 'gpt.pt')):
            with self.subTest(message):
                other = folder_with(text)
                (other / 'gpt.pt').write_bytes(good)
                self.assertIn(message, execute('gpt.py', f'{sizeless} {settings}', other).message)
                self.assertEqual((other / 'gpt.pt').read_bytes(), good)

    def test_architecture(self):
        """What a model computes is compared with its checkpoint."""
        for script, changes in (
                ('gpt.py', 'n_head=4 mlp_width=2'),
                ('modern_gpt.py', 'n_head=4 mlp_width=2 n_kv_head=2 activation=gelu '
                                  'rotary=False head_gate=False tied=True ngram=3 ngram_rows=99 '
                                  'smear=2 qk_norm=True rms_norm=True muon=False')):
            folder = run(script, '--max_iters=1').folder
            for change in changes.split():
                ended = run(script, f'--max_iters=1 --resume --{change}', folder)
                self.assertIn('was trained with', ended.message, change)

    def test_last_step(self):
        """The last step is evaluated, whatever the interval."""
        for script in SCRIPTS:
            ended = run(script, '--max_iters=6')
            self.assertEqual(losses(ended.out)[-1][0], 6, script)

    def test_screens(self):
        """Letters that stdout can't show become '?'; no stdout at all is no error."""
        shown = io.TextIOWrapper(io.BytesIO(), 'ascii')
        for stdout in shown, None:
            with mock.patch('sys.stdout', stdout), mock.patch('contextlib.redirect_stdout'):
                ended = run('gpt.py', '', folder_with('тоже 日本 ' * 200))
                self.assertEqual(ended.message, 'fine')
        self.assertIn('?', sample(shown.buffer.getvalue().decode()))

    def test_readme(self):
        """The code that the README quotes is the scripts' own; what it runs, runs."""
        names = run('gpt.py', '--block_size=64 --n_head=4', folder_with(read('input.txt'))).names
        code = ''.join(map(read, SCRIPTS))
        for quoted in re.findall(r'^```python\n(.*?)^```', read('README.md'), re.M | re.S):
            if 'print(' in quoted:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(quoted, names)
                self.assertGreater(len(out.getvalue()), 60)
            else:
                self.assertLessEqual({*quoted.splitlines()}, {*code.splitlines()})

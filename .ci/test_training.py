"""Training: batches, optimizers, evaluation, and runs that are stopped and resumed."""
import collections, math, re, signal, subprocess, sys, time, unittest
import torch
from torch.nn import functional as F
from torch.optim.optimizer import (register_optimizer_step_post_hook,
                                   register_optimizer_step_pre_hook)
from common import (OVERFITS, SCRIPTS, SMALL, TEXT, TEXTUAL, UNIQUE, Screen, evaluate, execute,
                    fit, folder_with, get_batch, interrupt, kill, load, losses, read, run,
                    same_end, sample, untrained, warmup)

class Training(unittest.TestCase):
    def test_batches(self):
        """Sequences of the training text and their next characters; every place can occur."""
        for script in TEXTUAL:
            names = untrained(script, '--batch_size=20000 --epochs=False',
                              folder_with(UNIQUE[:600]))
            x, y = get_batch(names, step=1)
            self.assertTrue(torch.equal(x[:, 1:], y[:, :-1]))
            rows = {names['decode'](row) for row in torch.cat((x, y[:, -1:]), dim=1).tolist()}
            self.assertEqual(rows, {UNIQUE[i:i + 17] for i in range(540 - 16)})

    def test_epochs(self):
        """In each epoch every sequence comes once, in an order and at an offset of its own."""
        names = untrained('modern_gpt.py', '--batch_size=11', folder_with(UNIQUE))
        orders = set()
        for epoch in range(3):
            rows = []
            for batch in range(1, 7):  # 66 whole sequences of 16 in 1,080 characters
                x, y = get_batch(names, step=6 * epoch + batch)
                self.assertTrue(torch.equal(x[:, 1:], y[:, :-1]))
                rows += [UNIQUE.index(names['decode'](row)) for row in x.tolist()]
            self.assertEqual(sorted(rows), [*range(min(rows), min(rows) + 66 * 16, 16)])
            orders.add((min(rows), tuple(row - min(rows) for row in rows)))
        self.assertEqual(len({order for _, order in orders}), 3)
        self.assertGreater(len({offset for offset, _ in orders}), 1)

    def test_optimizers(self):
        """Each parameter has one optimizer; matrices decay, vectors do not; the rate rises, then
        falls to zero; gradients are clipped."""
        settings = f'{warmup(3)} --weight_decay=3 --grad_clip=0.3'
        for name in 'learning_rate', 'muon_learning_rate', 'finetune_learning_rate':
            settings += f' --{name}=0.02'
        for script in SCRIPTS:
            with self.subTest(script):
                groups = []  # of every step
                def note(optimizer, *_):
                    for group in optimizer.param_groups:
                        norms = [p.grad.norm() for p in group['params']]
                        decay = group['weight_decay']
                        groups.append((group['lr'], decay, group['params'], norms))
                hook = register_optimizer_step_pre_hook(note)
                model = run(script, settings).names['model']
                hook.remove()
                n = len(groups) // (36 if 'pretrain' in script else 12)  # groups of one step
                ids = {id(p) for _, _, params, _ in groups[-n:] for p in params}
                self.assertEqual(len(ids), sum(len(params) for _, _, params, _ in groups[-n:]))
                self.assertEqual(len(ids), len([*model.parameters()]))
                for i, (rate, decay, params, _) in enumerate(groups[-12 * n:]):
                    step = 1 + i // n
                    rise = 1 if script == 'bigram.py' else min(step / 4, 1)
                    expected = 0.02 * rise * math.cos(math.pi / 2 * (step - 1) / 12)
                    self.assertAlmostEqual(rate, expected, 6)
                    if script not in ('bigram.py', 'addition_gpt.py'):
                        self.assertEqual({3 if p.dim() == 2 else 0 for p in params}, {decay})
                norms = [math.hypot(*(norm for *_, part in groups[i:i + n] for norm in part))
                         for i in range(0, len(groups), n)]
                if script != 'bigram.py':
                    self.assertAlmostEqual(max(norms), 0.3, 4)

    @unittest.skipUnless(hasattr(torch.optim, 'Muon'), 'PyTorch has Muon from 2.9 on')
    def test_muon(self):
        """The steps of Muon are those of PyTorch's, which computes them in bfloat16."""
        twins = {}  # parameter -> a copy of it, with PyTorch's optimizer
        seen = []
        def before(optimizer, *_):
            for group in optimizer.param_groups if type(optimizer).__name__ == 'Muon' else ():
                for p in group['params']:
                    if p not in twins:
                        twin = p.detach().clone()
                        twins[p] = twin, torch_muon([twin], weight_decay=3, momentum=0.9)
                    twin, muon = twins[p]
                    twin.copy_(p.detach())
                    twin.grad = p.grad.clone()
                    muon.param_groups[0]['lr'] = group['lr']
        def after(optimizer, *_):
            for p, (twin, muon) in twins.items() if type(optimizer).__name__ == 'Muon' else ():
                start = twin.clone()
                muon.step()
                seen.append(((twin - p).norm() / (twin - start).norm()).item())
        torch_muon = type('PyTorchs', (torch.optim.Muon,), {})  # another name
        hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        trained = run('modern_gpt.py', '--weight_decay=3')
        self.assertEqual(trained.message, 'fine')
        for hook in hooks:
            hook.remove()
        self.assertEqual(len(seen), 12 * 2 * 4)
        self.assertLess(max(seen), 0.1)

    def test_evaluation(self):
        """The mean over the whole validation text, without dropout, whatever the batch."""
        for script in TEXTUAL:
            names = untrained(script, '--dropout=0.5', folder_with(TEXT * 3))
            model, val = names['model'].train(), names['val_data']
            random = torch.get_rng_state()
            loss = evaluate(names, model, val)
            self.assertTrue(torch.equal(random, torch.get_rng_state()))
            model.eval()
            count = (len(val) - 1) // 16
            self.assertGreater(count, 64)  # more than one part
            parts = [F.cross_entropy(model(val[None, i:i + 16])[0][0], val[i + 1:i + 17]).item()
                     for i in range(0, 16 * count, 16)]
            self.assertAlmostEqual(loss, sum(parts) / count, places=4)

    def test_counting(self):
        """bigram.py on input.txt ends within 0.005 nats of what counting all pairs gives."""
        text = read('input.txt')
        trained = execute('bigram.py', '', folder_with(text))
        n, vocab_size = int(0.9 * len(text)), len(set(text))
        pairs = collections.Counter(zip(text[:n], text[1:n]))
        firsts = collections.Counter(text[:n - 1])
        val = text[n:n + (len(text) - n - 1) // 64 * 64 + 1]  # whole sequences of 64
        counted = -sum(math.log((pairs[pair] + 1) / (firsts[pair[0]] + vocab_size))
                       for pair in zip(val, val[1:])) / (len(val) - 1)
        self.assertIn(f'val loss {counted:.4f}\n', trained.out)
        last = losses(trained.out)[-1][2]
        self.assertLess(abs(last - counted), 0.005)
        names = trained.names  # it samples from what was trained
        loss = evaluate(names, names['model'], names['val_data'])
        self.assertAlmostEqual(loss, last, delta=6e-5)

    def test_dtypes(self):
        """bfloat16 and float16 (with loss scaling) learn nearly what float32 learns; a step whose
        gradient overflows is left out."""
        for script in 'gpt.py', 'modern_gpt.py':
            last = {}
            for dtype in 'float32', 'bfloat16', 'float16':
                last[dtype] = load(run(script, f'--dropout=0 --dtype={dtype}'))['train_loss']
            self.assertEqual(len(set(last.values())), 3)
            self.assertLess(max(last.values()) - min(last.values()), 0.02)
            names = {}
            def overflow():
                names['model'].wte.weight.register_hook(lambda grad: grad * math.inf)
            screen = Screen('^ +11 ', overflow)
            spoiled = run(script, '--dtype=float16', names=names, screen=screen)
            self.assertEqual(losses(spoiled.out)[-1][0], 12)
            self.assertTrue(all(p.isfinite().all() for p in load(spoiled)['model'].values()))

class Stopped(unittest.TestCase):
    """Stopped anywhere and resumed: the same to the last bit as never stopped."""

    def test_resume(self):
        """Killed after a checkpoint, or ended by Ctrl-C between two."""
        for script, text, more in (('gpt.py', TEXT, ''), ('gpt.py', OVERFITS, '--max_iters=40'),
                                   ('gpt.py', TEXT, '--dtype=bfloat16'),
                                   ('modern_gpt.py', TEXT, ''), ('gpt2.py', TEXT, '')):
            whole = run(script, more, folder_with(text))
            for pattern, action, step in (('^step 8:', kill, 8), ('^ +6 ', interrupt, 6),
                                          ('^step 36:', kill, 36)):
                if '40' not in more and step == 36:
                    continue
                with self.subTest(f'{script} {more} {step}'):
                    stopped = run(script, more, folder_with(text), screen=Screen(pattern, action))
                    self.assertEqual(stopped.message, 'killed' if action == kill else 'fine')
                    resumed = run(script, f'{more} --resume', stopped.folder)
                    self.assertRegex(resumed.out, f'after step {step}\\b')
                    same_end(self, resumed, whole)
            before = {path: path.read_bytes() for path in whole.folder.glob('*.pt*')}
            for prompt in 'to', 'e':  # just sample
                just = f'{more} --resume --max_iters=0 --prompt={prompt}'
                only = run(script, just, whole.folder)
                self.assertEqual((only.message, losses(only.out)), ('fine', []))
                self.assertTrue(sample(only.out).startswith(prompt))
            self.assertEqual({path: path.read_bytes() for path in whole.folder.glob('*.pt*')},
                             before)

    @unittest.skipUnless(hasattr(signal, 'SIGKILL'), 'needs the signals of Linux or macOS')
    def test_signals(self):
        """A process that is killed or gets Ctrl-C has saved."""
        more = '--max_iters=120 --eval_interval=10'
        whole = run('gpt.py', more)
        settings = fit('gpt.py', f'{SMALL} --dtype=float32 {more}').split()
        for how in signal.SIGKILL, signal.SIGINT:
            folder = folder_with(TEXT)
            (folder / 'gpt.py').write_text(read('gpt.py'), encoding='utf-8')
            with subprocess.Popen([sys.executable, 'gpt.py', *settings], cwd=folder,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                while not (folder / 'gpt.pt').exists() and process.poll() is None:
                    time.sleep(0.01)
                process.send_signal(how)
                out, err = process.communicate(timeout=100)
            if how == signal.SIGINT:
                self.assertEqual((process.returncode, err), (0, b''))
                self.assertEqual(len(sample(out.decode())), 41)
            after = run('gpt.py', f'{more} --resume', folder)
            self.assertTrue(0 < int(re.search(r'after step (\d+)', after.out)[1]) < 120)
            same_end(self, after, whole)
            self.assertEqual([*folder.glob('*.tmp')], [])

    def test_best_weights(self):
        """Where the loss rises again the best weights are kept, and used to sample; --resume
        takes the optimizer's settings from the command line."""
        for script in 'gpt.py', 'modern_gpt.py', 'gpt2.py':
            more = '--dropout=0 --vocab_size=257 --max_iters=40'
            trained = run(script, more, folder_with(OVERFITS))
            names, model, saved = trained.names, trained.names['model'], load(trained)
            *_, last = printed = [loss for _, _, loss in losses(trained.out)]
            best = min(printed)
            self.assertLess(best, last)
            perplexity = re.search(f'best val loss {best:.4f}, perplexity (.+)', trained.out)[1]
            self.assertAlmostEqual(math.log(float(perplexity)), best, 3)
            for weights, loss in (model.state_dict(), best), (saved['best'], best), (
                    saved['model'], last):
                model.load_state_dict(weights)
                self.assertAlmostEqual(evaluate(names, model, names['val_data']), loss, places=4)
            again = f'{more} --resume --max_iters=42 --beta2=0.9'
            names = run(script, again, trained.folder).names
            adamw = names.get('optimizers', [names.get('optimizer')])[0]
            self.assertEqual(adamw.param_groups[0]['betas'], (0.9, 0.9))

    def test_not_finite(self):
        """A loss that is not finite ends the run; what was saved stays whole."""
        folder = run('gpt.py').folder
        before = (folder / 'gpt.pt').read_bytes()
        wild = '--resume --max_iters=30 --learning_rate=1e30 --grad_clip=1e30'
        for interval in 1, 12:  # seen first in the evaluation, and in training
            diverged = run('gpt.py', f'{wild} --eval_interval={interval}', folder)
            self.assertRegex(diverged.message, 'the loss is .*(nan|inf)')
            self.assertEqual((folder / 'gpt.pt').read_bytes(), before)

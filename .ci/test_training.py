"""Training: batches, optimizers, evaluation, and runs that are stopped and resumed."""
import math, re, signal, subprocess, sys, time, unittest
from unittest import mock
from collections import Counter
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from common import (OVERFITS, SCRIPTS, SMALL, STAGES, TEXT, TEXTUAL, UNIQUE, UNTRAINED, Screen,
                    call, end, evaluate, execute, fit, folder_with, interrupt, load, losses, read,
                    run, sample, untrained)

class Training(unittest.TestCase):
    def test_batches(self):
        """Sequences of the training text and their next characters; every place can occur."""
        for script in TEXTUAL:
            more = '--batch_size=20000 --epochs=False'
            names = untrained(script, more, folder_with(UNIQUE[:600]))
            x, y = call(names, 'get_batch', step=1)
            self.assertTrue(torch.equal(x[:, 1:], y[:, :-1]))
            rows = {names['decode'](row) for row in torch.cat((x, y[:, -1:]), dim=1).tolist()}
            self.assertEqual(rows, {UNIQUE[i:i + 17] for i in range(540 - 16)})

    def test_epochs(self):
        """In each epoch every sequence comes once, in an order and at an offset of its own."""
        names = untrained('modern_gpt.py', '--batch_size=11', folder_with(UNIQUE))
        epochs = []
        for epoch in range(3):
            rows = []
            for batch in range(1, 7):  # 66 whole sequences of 16 in 1,080 characters
                x, y = call(names, 'get_batch', step=6 * epoch + batch)
                self.assertTrue(torch.equal(x[:, 1:], y[:, :-1]))
                rows += [UNIQUE.index(names['decode'](row)) for row in x.tolist()]
            self.assertEqual(sorted(rows), [*range(min(rows), min(rows) + 66 * 16, 16)])
            epochs.append((min(rows), tuple(row - min(rows) for row in rows)))
        offsets, orders = map(set, zip(*epochs))
        self.assertTrue(len(orders) == 3 and len(offsets) > 1)

    def test_optimizers(self):
        """Each parameter has one optimizer; matrices decay; rates rise and fall; clipping."""
        settings = '--warmup_ratio=0.25 --weight_decay=3 --ngram_decay=4 --grad_clip=0.3 '
        settings += ' '.join(f'--{kind}learning_rate=0.02' for kind in ('', 'muon_', 'finetune_'))
        for script in SCRIPTS:
            with self.subTest(script):
                seen = []  # parameter, rate, decay and norm of the gradient, step by step
                def note(optimizer, *_):
                    for group in optimizer.param_groups:
                        seen.extend((p, group['lr'], group['weight_decay'], p.grad.norm())
                                    for p in group['params'])
                hook = register_optimizer_step_pre_hook(note)
                model = run(script, settings).names['model']
                count = len([*model.parameters()])
                table = getattr(model, 'ngrams', None)  # modern_gpt.py's has its own decay
                hook.remove()
                steps = [seen[i:i + count] for i in range(0, len(seen), count)]
                for i, step in enumerate(steps[-12:]):  # of the last stage
                    rise = 1 if script == 'bigram.py' else min((i + 1) / 4, 1)
                    expected = 0.02 * rise * math.cos(math.pi / 2 * i / 12)
                    self.assertEqual(len({p for p, *_ in step}), count)
                    for p, rate, decay, _ in step:
                        self.assertAlmostEqual(rate, expected, 6)
                        if script not in ('bigram.py', 'addition_gpt.py'):
                            own = 4 if table and p is table.weight else 3
                            self.assertEqual(decay, own if p.dim() == 2 else 0)
                if script != 'bigram.py':
                    norms = [math.hypot(*(norm for *_, norm in step)) for step in steps]
                    self.assertAlmostEqual(max(norms), 0.3, 4)

    def test_no_clipping(self):
        """With grad_clip=0 gradients stay as they are; float16 enlarges none that is clipped."""
        for script in SCRIPTS[1:]:
            more = '--max_iters=4 --pretrain_max_iters=4 --dtype=float16'
            printed = [losses(run(script, f'{more} --grad_clip={norm}').out)
                       for norm in ('0.0', '1e3')]
            self.assertEqual(*printed, script)

    def test_peaks(self):
        """Each optimizer has the rate of its own setting, and beta2."""
        settings = ('--warmup_ratio=0 --beta2=0.5 --lora_rank=2 --learning_rate=0.02 '
                    '--muon_learning_rate=0.03 --pretrain_learning_rate=0.04 '
                    '--finetune_learning_rate=0.05 --lora_learning_rate=0.06')
        peaks = {'modern_gpt.py': [0.02, 0.03], 'pretrain_finetune.py': [0.04, 0.05, 0.02, 0.06]}
        for script in SCRIPTS[1:]:
            seen = {}  # optimizer: rate of its first step
            def note(optimizer, *_):
                seen.setdefault(optimizer, optimizer.param_groups[0]['lr'])
            hook = register_optimizer_step_pre_hook(note)
            run(script, settings)
            hook.remove()
            self.assertEqual([*seen.values()], peaks.get(script, [0.02]), script)
            for optimizer in seen:
                self.assertEqual(optimizer.param_groups[0].get('betas', (0, 0.5))[1], 0.5, script)

    def test_seed(self):
        """Another seed has other initial weights, and other batches at all steps."""
        for script in SCRIPTS:
            batches, weights = [set(), set()], {}
            for seed in 0, 1:
                def note(module, inputs):
                    if hasattr(module, 'generate') and torch.is_grad_enabled():
                        batches[seed].add(str(inputs[0].tolist()))
                        weights.setdefault(seed, next(module.parameters()).tolist())
                hook = nn.modules.module.register_module_forward_pre_hook(note)
                run(script, f'--seed={seed + 1} --max_iters=4 --pretrain_max_iters=4')
                hook.remove()
            self.assertEqual(batches[0] & batches[1], set(), script)
            self.assertEqual(weights[0] == weights[1], script == 'bigram.py', script)  # all zero

    def test_compile(self):
        """With use_compile each training step runs the compiled model."""
        for script in 'modern_gpt.py', 'gpt2.py':
            steps = []
            def compiled(model):
                return lambda *args: (steps.append(1), model(*args))[1]
            with mock.patch('torch.compile', compiled):
                run(script, '--use_compile')
            self.assertEqual(len(steps), 12)

    @unittest.skipUnless(hasattr(torch.optim, 'Muon'), 'PyTorch has Muon from 2.9 on')
    def test_muon(self):
        """The steps of Muon are those of PyTorch's, which computes them in bfloat16."""
        names = run('modern_gpt.py', f'{UNTRAINED} --weight_decay=0.5').names
        muon = names['optimizers'][1]
        params = [p for group in muon.param_groups for p in group['params']]
        self.assertEqual(len(params), 2 * 4)
        copies = [p.detach().clone() for p in params]
        theirs = torch.optim.Muon(copies, weight_decay=0.5, momentum=0.9)
        for rate in 0.05, 0.02, 0.01, 0.02:
            for group in muon.param_groups + theirs.param_groups:
                group['lr'] = rate
            for p, copy in zip(params, copies):
                p.grad = copy.grad = torch.randn_like(copy)
            starts = [copy.clone() for copy in copies]
            muon.step()
            theirs.step()
            for p, copy, start in zip(params, copies, starts):
                self.assertLess((copy - p).norm() / (copy - start).norm(), 0.15)
                p.data.copy_(copy)

    def test_evaluation(self):
        """The mean over the whole validation text, without dropout, whatever the batch."""
        for script in [*TEXTUAL, 'gpt2.py']:
            names = untrained(script, '--dropout=0.5')
            model = names['model'].train()
            val = torch.randint(names['vocab_size'], (16 * 77 + 9,))
            loss = evaluate(names, model, val.numpy() if script == 'gpt2.py' else val)
            logits, _ = model.eval()(val[:16 * 77].view(77, 16))
            expected = F.cross_entropy(logits.flatten(0, 1), val[1:16 * 77 + 1]).item()
            self.assertAlmostEqual(loss, expected, places=4)

    def test_counting(self):
        """bigram.py on input.txt ends within 0.005 nats of what counting all pairs gives."""
        text = read('input.txt')
        trained = execute('bigram.py', '', folder_with(text))
        n, vocab_size = int(0.9 * len(text)), len(set(text))
        pairs, firsts = Counter(zip(text[:n], text[1:n])), Counter(text[:n - 1])
        val = text[n:n + (len(text) - n - 1) // 64 * 64 + 1]  # whole sequences of 64
        counted = -sum(math.log((pairs[pair] + 1) / (firsts[pair[0]] + vocab_size))
                       for pair in zip(val, val[1:])) / (len(val) - 1)
        self.assertIn(f'val loss {counted:.4f}\n', trained.out)
        last = losses(trained.out)[-1][2]
        self.assertLess(abs(last - counted), 0.005)
        names = trained.names  # it samples from what was trained
        self.assertAlmostEqual(evaluate(names, names['model'], names['val_data']), last, 4)

    def test_dtypes(self):
        """All dtypes learn nearly the same; a step whose gradient overflows is left out."""
        for script in 'gpt.py', 'modern_gpt.py':
            last = [load(run(script, f'--dropout=0 --dtype={dtype}'))['train_loss']
                    for dtype in ('float32', 'bfloat16', 'float16')]
            self.assertEqual(len(set(last)), 3)
            self.assertLess(max(last) - min(last), 0.02)
            names = {}
            screen = Screen('^ +11 ', lambda: names['model'].wte.weight.register_hook(
                lambda grad: grad * math.inf))
            spoiled = run(script, '--dtype=float16', names=names, screen=screen)
            self.assertEqual(losses(spoiled.out)[-1][0], 12)
            self.assertTrue(all(p.isfinite().all() for p in load(spoiled)['model'].values()))

class Stopped(unittest.TestCase):
    """Stopped anywhere and resumed: the same to the last bit as never stopped."""

    def test_resume(self):
        """In each stage, as if killed, and by Ctrl-C. What is saved survives what comes later."""
        def interrupt_once():
            interrupt()  # the next one would end the run at once
            self.assertIs(signal.getsignal(signal.SIGINT), signal.default_int_handler)

        stops = '^step 8:', '^ +6 ', '^ +8 '
        in_stages = [f'^{stage}:.*?{stop}' for stage in STAGES for stop in stops]
        for script, text, more, patterns in (
                ('gpt.py', OVERFITS, '--max_iters=40', [*stops, '^step 36:']),
                ('gpt.py', TEXT, '', ['^step 8:.*?-\n.*? ']),  # while it writes a sample
                ('gpt.py', TEXT, '--dtype=bfloat16', stops),
                ('pretrain_finetune.py', OVERFITS, '--lora_rank=2', in_stages),
                ('modern_gpt.py', TEXT, '', stops), ('gpt2.py', TEXT, '', stops)):
            whole = run(script, more, folder_with(text))
            for pattern in patterns:
                with self.subTest(f'{script} {more} {pattern}'):
                    action = interrupt_once if pattern.endswith(' ') else sys.exit
                    screen = Screen(pattern, action)
                    stopped = run(script, more, folder_with(text), screen=screen)
                    self.assertIsNone(screen.action)  # it has been called
                    resumed = run(script, f'{more} --resume', stopped.folder)
                    self.assertIn('after step ' + re.search(r'\d+', pattern)[0], resumed.out)
                    self.assertTrue(end(resumed) == end(whole))
                    self.assertEqual([*stopped.folder.glob('*.old')], [])
                    both = losses(stopped.out) + losses(resumed.out)
                    self.assertEqual(both, losses(whole.out))  # nothing is trained twice
            files = {path: path.read_bytes() for path in whole.folder.glob('*.pt')}
            for prompt in 'to', 'e':
                just = f'{more} --resume --max_iters=0 --prompt={prompt}'
                only = run(script, just, whole.folder)
                self.assertEqual((only.message, losses(only.out)), ('fine', []))
                self.assertTrue(sample(only.out).startswith(prompt))
            refused = run(script, f'{more} --resume --n_layer=3', whole.folder)
            self.assertIn('n_layer', refused.message)
            run(script, f'{more} --seed=3', whole.folder)
            for path, contents in files.items():
                self.assertEqual(path.with_suffix('.pt.old').read_bytes(), contents)

    @unittest.skipUnless(hasattr(signal, 'SIGKILL'), 'needs the signals of Linux or macOS')
    def test_signals(self):
        """A process that is killed or gets Ctrl-C has saved."""
        settings = fit('gpt.py', f'{SMALL} --max_iters=120 --eval_interval=10').split()
        for how, code in (signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 0):
            folder = folder_with(TEXT)
            (folder / 'gpt.py').write_text(read('gpt.py'), encoding='utf-8')
            with subprocess.Popen([sys.executable, 'gpt.py', *settings], cwd=folder,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                while not (folder / 'gpt.pt').exists() and process.poll() is None:
                    time.sleep(0.01)
                process.send_signal(how)
                _, errors = process.communicate(timeout=100)
            self.assertEqual((process.returncode, errors), (code, b''))
            resumed = run('gpt.py', '--max_iters=120 --resume', folder)
            self.assertTrue(0 < int(re.search(r'after step (\d+)', resumed.out)[1]) < 120)
            self.assertEqual(losses(resumed.out)[-1][0], 120)

    def test_best_weights(self):
        """The best weights are kept, and used to sample; --resume takes new settings."""
        for script in 'gpt.py', 'modern_gpt.py', 'gpt2.py':
            more = '--dropout=0 --vocab_size=257 --max_iters=40 --mlp_width=6'
            trained = run(script, more, folder_with(OVERFITS))
            names, model, saved = trained.names, trained.names['model'], load(trained)
            printed = [loss for *_, loss in losses(trained.out)]
            best, last = min(printed), printed[-1]
            self.assertLess(best, last)
            self.assertFalse(model.training)  # one can go on with it in the next cell
            perplexity = re.search(f'{best:.4f}.*perplexity ([0-9.]+)', trained.out)[1]
            self.assertAlmostEqual(math.log(float(perplexity)), best, 3)
            states = [model.state_dict(), saved['best'], saved['model']]
            for state, loss in zip(states, (best, best, last)):
                model.load_state_dict(state)
                self.assertAlmostEqual(evaluate(names, model, names['val_data']), loss, places=4)
            more += ' --resume --max_iters=42 --beta2=0.9'
            names = run(script, more, trained.folder).names
            if script == 'gpt2.py':
                bits = names['bits_per_byte'](best, names['val_data'][1:], names['encoding'])
                printed = re.search(r'([0-9.]+) bits per byte', trained.out)[1]
                self.assertAlmostEqual(float(printed), bits, 3)
            adamw = names.get('optimizers', [names.get('optimizer')])[0]
            self.assertEqual(adamw.param_groups[0]['betas'], (0.9, 0.9))

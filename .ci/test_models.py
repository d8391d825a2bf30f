"""The models: their logits, what they see, what they write."""
import contextlib, inspect, io, math, re, unittest
from unittest import mock
import torch
from torch.nn import functional as F
from common import (SCRIPTS, TEXT, TEXTUAL, UNTRAINED, call, execute, folder_with, losses, read,
                    run, sample, untrained)

ACTIVATIONS = {
    'gelu': lambda x: x / 2 * (1 + torch.erf(x / 2**0.5)),
    'tanh': lambda x: x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    'quick_gelu': lambda x: x / (1 + torch.exp(-1.702 * x)),
    'relu': lambda x: x.clamp(min=0), 'relu2': lambda x: x.clamp(min=0) ** 2,
    'swiglu': lambda x: math.prod((x.chunk(2, -1)[0].sigmoid(), *x.chunk(2, -1)))}

def reference(names, model, idx):
    """Logits (B, T, vocab) of a script's model from its weights and settings, by the formulas."""
    w = dict(model.named_parameters(remove_duplicate=False))
    config = vars(model.config) if hasattr(model, 'config') else names
    n_head = config['n_head']
    n_kv_head = names.get('n_kv_head', n_head)
    kind = names['Block'].__name__
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

    def rotate(x):
        half = x.shape[-1] // 2
        angle = torch.arange(T)[:, None] * 10000 ** -(torch.arange(half) / half)
        x = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
        return torch.cat((x.real, x.imag), dim=-1)

    def attention(x, i):
        head_size = x.shape[-1] // n_head
        sizes = n_head * head_size, n_kv_head * head_size, n_kv_head * head_size
        q, k, v = (part.view(B, T, -1, head_size).transpose(1, 2)
                   for part in linear(x, f'h.{i}.attn.c_attn').split(sizes, dim=-1))
        k, v = (part.repeat_interleave(n_head // n_kv_head, dim=1) for part in (k, v))
        if names.get('qk_norm'):
            q, k = norm(q), norm(k)
        if names.get('rotary'):
            q, k = rotate(q), rotate(k)
        att = (q @ k.transpose(-2, -1) / math.sqrt(head_size)).exp().tril()
        if f'h.{i}.attn.bias' in w:  # addition_gpt.py: only the own column and the next
            L = idx[0].tolist().index(10)
            column = torch.tensor([*range(L, 0, -1), L + 1, *range(L, -1, -1), *range(1, L + 2)])
            distance = (column - column[:, None])[:T, :T].clamp(-1, 2)
            share = F.pad(w[f'h.{i}.attn.bias'].exp(), (0, 2))  # of columns 0, 1, 2, -1
            att = att * share[:, distance]
        y = att / att.sum(-1, keepdim=True) @ v
        if f'h.{i}.attn.gate.weight' in w:
            gate = 2 * linear(x, f'h.{i}.attn.gate').sigmoid()  # (B, T, n_head)
            y = y * gate.transpose(1, 2)[..., None]
        return linear(y.transpose(1, 2).reshape(B, T, -1), f'h.{i}.attn.c_proj')

    def mlp(x, i):
        activation = 'tanh' if hasattr(model, 'config') else names.get('activation', 'gelu')
        x = ACTIVATIONS[activation](linear(x, f'h.{i}.mlp.c_fc'))
        return linear(x, f'h.{i}.mlp.c_proj')

    def smear(x, name):
        shares = w.get(f'{name}.share', ())
        return x + sum(share * F.pad(x, (0, 0, back, 0))[:, :T]
                       for back, share in enumerate(shares, 1))

    x = w['wte.weight'][idx]
    if 'wpe.weight' in w:
        x = x + w['wpe.weight'][:T]
    for n in range(2, names.get('ngram', 1) + 1):  # a number with n digits for the last n tokens
        row = [[sum(ids[t - k] * 2_654_435_761 ** (n - 1 - k) for k in range(min(n, t + 1)))
                for t in range(T)] for ids in idx.tolist()]
        rows = [[number % names['ngram_rows'] for number in ids] for ids in row]
        x = x + w['ngrams.weight'][torch.tensor(rows)]
    x = smear(x, 'smear')
    for i in range(config['n_layer']):
        before = (lambda x, name: norm(x, f'h.{i}.{name}') if kind == 'Block' else x)
        after = (lambda x, name: norm(x, f'h.{i}.{name}') if kind == 'PostNorm' else x)
        past = 0 if kind in ('AttentionOnly', 'AttentionThenMLP') else 1
        x = after(past * x + attention(smear(before(x, 'ln_1'), f'h.{i}.smear_1'), i), 'ln_1')
        if kind != 'AttentionOnly':
            x = after(past * x + mlp(smear(before(x, 'ln_2'), f'h.{i}.smear_2'), i), 'ln_2')
    return linear(norm(x, 'ln_f'), 'lm_head')

MODERN = '--n_head=4 --qk_norm=True'
MODELS = [  # script, settings
    *(('gpt.py', f'--rung={rung}') for rung in range(2, 13)),
    ('pretrain_finetune.py', ''), ('gpt2.py', '--n_head=4'), ('modern_gpt.py', MODERN),
    ('modern_gpt.py', f'{MODERN} --n_kv_head=1 --activation=relu2 --flash=True '
                      '--ngram_rows=9'),
    ('modern_gpt.py', f'{MODERN} --n_kv_head=4 --activation=gelu --tied=True --smear=0 '
                      '--head_gate=False --ngram=1'),
    ('modern_gpt.py', f'{MODERN} --n_kv_head=2 --activation=quick_gelu --rms_norm=True '
                      '--qk_norm=False'),
    ('modern_gpt.py', f'{MODERN} --activation=relu --rotary=False')]

class Models(unittest.TestCase):
    def test_reference(self):
        """The logits are those of the formulas; later tokens change no earlier ones; the loss."""
        for script, settings in MODELS:
            with self.subTest(f'{script} {settings}'):
                names = untrained(script, settings)
                model = names['model']
                vocab_size = model.wte.num_embeddings
                tied = model.lm_head.weight is model.wte.weight
                self.assertEqual(tied, names.get('tied', True))
                for T in 1, 5, 16:
                    idx = torch.randint(vocab_size, (2, T))
                    logits, loss = model(idx, idx)
                    expected = reference(names, model, idx)
                    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
                    torch.testing.assert_close(loss, F.cross_entropy(expected.mT, idx))
                other = idx.clone()
                other[:, 9] = (other[:, 9] + 1) % vocab_size
                change = (logits - model(other)[0]).abs().amax(dim=(0, 2))
                self.assertLess(change[:9].max().item(), 1e-5)
                self.assertGreater(change[9:].min().item(), 1e-4)

    def test_initial_weights(self):
        """The spread of the initial weights is the gain / sqrt(inputs)."""
        for script in SCRIPTS[1:]:
            more = (f'{UNTRAINED} --n_embd=64 --n_head=2 --init_gain=0.5 --c_proj_gain=0.1 '
                    '--lora_rank=9')
            for name, p in run(script, more).names['model'].named_parameters():
                if name.endswith('attn.bias') and script == 'addition_gpt.py':
                    self.assertTrue(torch.equal(p, 3 * torch.eye(2)))
                elif p.dim() == 2 and not name.endswith('.B'):  # LoRA's A has the gain 1
                    gain = 1 if name.endswith('.A') else 0.1 if 'c_proj' in name else 0.5
                    if script == 'modern_gpt.py' and re.search('gate|smear|lm_head', name):
                        gain = 0
                    spread = p.std().item() * p.shape[1] ** 0.5
                    self.assertAlmostEqual(spread, gain, delta=0.1 * gain, msg=(script, name))

    def test_dropout(self):
        """In training each part of a model drops, in evaluation none."""
        x = torch.randn(1, 16, 32)
        for script, more in (('gpt.py', ''), ('pretrain_finetune.py', ''), ('modern_gpt.py', ''),
                             ('modern_gpt.py', '--flash=True'), ('gpt2.py', '')):
            model = untrained(script, f'--dropout=0.5 {more}')['model']
            for part in model.drop, model.h[0].attn, model.h[0].mlp, model.h[0].attn:
                self.assertTrue(torch.equal(part.eval()(x), part(x)))
                self.assertFalse(torch.equal(part.train()(x), part(x)), script)
                model.h[0].attn.resid_dropout.p = 0.0  # leaves the dropout of the weights

    def test_ladder(self):
        """Each rung has the README's parameters; what is typed overrides it."""
        rows = re.findall(r'^\| (\d+) \|.*?\| ([\d,]+) \| \d\.\d{4} \|', read('README.md'), re.M)
        folder = folder_with(TEXT + ''.join(map(chr, range(1000, 1065 - len({*TEXT})))))
        self.assertEqual([int(rung) for rung, _ in rows], [*range(1, 13)])
        for rung, count in rows[1:]:
            settings = f'--device=cpu --max_iters=0 --max_new_tokens=1 --rung={rung}'
            names = execute('gpt.py', settings, folder).names
            found = sum(p.numel() for p in names['model'].parameters())
            self.assertEqual((f'{found:,}', names['n_head'], names['model'].drop.p),
                             (count, 1 if rung == '2' else 4, 0.1 if rung == '10' else 0))
        self.assertEqual(len(untrained('gpt.py', '--rung=9 --n_layer=1')['model'].h), 1)
        last = [losses(run('gpt.py', rung).out) for rung in ('--rung=11', '--rung=12')]
        self.assertEqual(*last)  # but for sizes, which the settings of the tests replace

    def test_sampling(self):
        """Temperature, top_k and top_p do what they say."""
        for script in [*TEXTUAL, 'gpt2.py']:
            model = untrained(script)['model']
            idx = torch.tensor([[0, 1]]).repeat(5000, 1)
            rows = [dict(temperature=0.1), {}]
            if script != 'bigram.py':
                rows += [dict(temperature=0.5, top_k=3), dict(temperature=1e-4),
                         dict(top_k=1), dict(top_k=999)]
            if script == 'gpt2.py':
                rows += [dict(temperature=2.0, top_p=0.6), dict(top_k=9, top_p=0.5)]
            for row in rows:
                logits = model(idx[:1])[0][0, -1] / row.get('temperature', 1.0)
                chances, order = F.softmax(logits, dim=0).sort(descending=True)
                chances[row.get('top_k', len(chances)):] = 0
                chances[chances.cumsum(0) - chances >= row.get('top_p', 1) * chances.sum()] = 0
                chances /= chances.sum()
                drawn = next(model.generate(idx, 1, **row))
                share = torch.bincount(drawn[:, 0], minlength=len(chances))[order] / 5000
                self.assertLess((share - chances).abs().max().item(), 0.03, (script, row))
                self.assertEqual(share[chances == 0].sum().item(), 0, (script, row))

    def test_sample(self):
        """The text at the end continues the prompt, by the settings."""
        settings = dict(temperature=0.5, top_k=4, top_p=0.7)
        more = '--prompt=moon --temperature=0.5 --top_k=4 --top_p=0.7'
        for script in [*TEXTUAL, 'gpt2.py']:
            names = untrained(script, more)
            model, prompt = names['model'], 'moon'
            ids = (names['encoding'].encode_ordinary(prompt) if script == 'gpt2.py' else
                   names['encode'](prompt))
            signature = inspect.signature(model.generate)
            with (mock.patch.object(model, 'generate', return_value=[]) as generate,
                  contextlib.redirect_stdout(io.StringIO())):
                call(names, 'sample', n=9)
            given = signature.bind(*generate.call_args[0], **generate.call_args[1]).arguments
            self.assertEqual(given.pop('idx').tolist(), [ids])
            expected = {name: value for name, value in settings.items() if name in names}
            self.assertEqual(given, dict(max_new_tokens=9, **expected), script)

    def test_context(self):
        """A token follows from the last block_size; a full cache is reread from its last half."""
        rows = [('gpt.py', '', 3, 16), ('pretrain_finetune.py', '', 3, 16), ('gpt2.py', '', 5, 8),
                ('gpt2.py', '', 25, 8), ('modern_gpt.py', '--kv_cache=False', 3, 16),
                ('modern_gpt.py', '', 25, 8)]
        rows += [('modern_gpt.py', f'--n_head=4 {more}', 3, 8) for more in (
            '--qk_norm=True', '--n_kv_head=4 --flash=True',
            '--n_kv_head=1 --rotary=False --smear=0')]
        for script, more, length, kept in rows:
            with self.subTest(f'{script} {more} {length}'):
                model = untrained(script, more)['model']
                idx = torch.randint(model.wte.num_embeddings, (3, length))
                new, seen = [], []  # how many positions are computed; the last logits
                model.h[0].register_forward_hook(lambda *a: new.append(a[2].shape[1]))
                model.lm_head.register_forward_hook(lambda *a: seen.append(a[2][:, -1]))
                out = torch.cat([idx, *model.generate(idx, 40)], dim=1)
                self.assertEqual(out.shape, (3, length + 40))
                first = max(0, length - 16)  # of what is read
                for i, t in enumerate(range(length, length + 40)):
                    full = t - first > 16
                    first = t - kept if full else first
                    whole = full or i == 0 or kept == 16
                    self.assertEqual(new[i], t - first if whole else 1)
                    torch.testing.assert_close(seen[i], model(out[:, first:t])[0][:, -1])

    def test_modern_is_gpt(self):
        """With every switch at gpt.py's choice: its losses, weights and text, to the last bit."""
        switches = ('--muon=False --epochs=False --activation=gelu --rotary=False --smear=0 '
                    '--ngram=1 --head_gate=False --qk_norm=False --rms_norm=False --flash=False '
                    '--tied=True --kv_cache=False --mlp_width=4 --c_proj_gain=0.3 ')
        for more in '--n_kv_head=2', '--dtype=bfloat16 --n_head=4 --n_embd=48 --n_kv_head=4':
            classic = run('gpt.py', f'{more} --top_k=1')
            modern = run('modern_gpt.py', f'{switches} {more} --top_k=1')
            self.assertEqual(losses(classic.out), losses(modern.out))
            self.assertEqual(sample(classic.out), sample(modern.out))
            a, b = (run.names['model'].state_dict() for run in (classic, modern))
            self.assertTrue(all(torch.equal(p, b[name]) for name, p in a.items()))

"""A tiny base model for an embedded world: its tokenizer, and its training on demonstrations."""

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def word_tokenizer(words, pattern):
    """A fast tokenizer with one token per word; `pattern` finds the words in a text."""
    index = {word: i for i, word in enumerate([PAD, EOS, UNK, *words])}
    backend = Tokenizer(models.WordLevel(index, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()
    marks = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **marks)


def train(tokenizer, draw, seed, layers, width, positions, updates, lr, progress=True):
    """A Llama model, fitted by cross-entropy to the responses of draw()'s (prompt, response)."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=width // 32,
        initializer_range=0.1,  # with 0.02 a model this narrow does not learn in 4,000 updates
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, max_position_embeddings=positions,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, updates // 20, updates)
    bar = tqdm(range(updates), desc="toy: base model", disable=not progress)
    for _ in bar:
        prompts, responses = zip(*draw())
        whole = tokenizer([p + r + EOS for p, r in zip(prompts, responses)])["input_ids"]
        rows = []
        for ids, asked in zip(whole, tokenizer(list(prompts))["input_ids"]):
            token_L, label_L = torch.tensor([ids, ids])
            label_L[: len(asked)] = -100
            rows.append((token_L, label_L))
        rows.sort(key=lambda row: len(row[0]))  # rows of like length side by side: little padding
        tokens, total = sum(int((label_L >= 0).sum()) for _, label_L in rows), 0.0
        for start in range(0, len(rows), 16):
            tokens_of, labels_of = zip(*rows[start : start + 16])
            token_BL = pad_sequence(tokens_of, True, tokenizer.pad_token_id)
            label_BL = pad_sequence(labels_of, True, -100)
            loss = model(input_ids=token_BL, labels=label_BL, num_items_in_batch=tokens).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{total:.3f}")
    return model

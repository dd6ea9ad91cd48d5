"""Small ImageReward models: the golden's tokenizer, and random weights of other sizes in the same layout."""

from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / "assets" / "rewards" / "imagereward"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "two", "red", "cat", "dog", "on", "mat", "in", "the", "##s"]


def tokenizer(folder: Path, more: int = 58 - len(WORDS)) -> Path:
    """BERT's files, for as many words as the golden's text encoder has rows for, less the two that BLIP adds."""
    words = [*WORDS, *(f"[unused{i}]" for i in range(more))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return folder


def random_weights(folder: Path, sizes: dict[int, int]) -> Path:
    """The golden's tensors with other sizes, by its own, and random values."""
    state = torch.load(GOLDEN / "ImageReward.pt", map_location="meta", weights_only=True)
    torch.manual_seed(7)
    for name, tensor in state.items():
        shape = [sizes.get(size, size) for size in tensor.shape]
        state[name] = torch.randn(shape) * 0.05 + (name.endswith("weight") and len(shape) == 1)
    torch.save(state, folder / "ImageReward.pt")
    return folder

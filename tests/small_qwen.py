"""Small Qwen2-VLs as HPS-v3 is laid out: the golden's, with a tokenizer of as many words, and random ones of other sizes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "assets" / "rewards" / "hpsv3"
IMAGE, START, END, REWARD = 110, 112, 113, 115
CHATTING = {"<|endoftext|>": 0, "<|im_end|>": 109, "<|image_pad|>": IMAGE, "<|video_pad|>": 111, "<|vision_start|>": START}
CHATTING |= {"<|vision_end|>": END, "<|im_start|>": 114}
WORDS = ["[UNK]", "system", "user", "assistant", "You", "are", "a", "helpful", ".", "rate", "the", "picture", "of", ":", "end"]
WORDS += ["cat", "dog", "red", "two", "{", "}"]
TEXTS = """
INSTRUCTION = "\\nrate the picture of {text_prompt}\\n"
prompt_with_special_token = "\\nrate : <|Reward|>\\n\\nend\\n"
"""


def lay_out(folder: Path) -> Path:
    """The files of a base model beside the golden weights: a tokenizer of as many words, and texts of the same form."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    free = [i for i in range(115) if i not in CHATTING.values()]
    vocabulary = dict(zip(WORDS + [f"w{i}" for i in range(len(free) - len(WORDS))], free, strict=True))
    tokenizer = Tokenizer(WordLevel(vocabulary | CHATTING, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(list(CHATTING))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>").save_pretrained(folder)
    shutil.copy(GOLDEN / "config.json", folder)
    (folder / "texts.py").write_text(f"import torchvision  # not here\n{TEXTS}raise SystemExit\n")
    return folder


def random_weights(folder: Path, config: Mapping[str, object], vision: Mapping[str, object]) -> Path:
    """The golden's configuration with other sizes, and random weights for it."""
    from adagrpo.rewards.hpsv3 import Backbone, Head, read_config
    from adagrpo.rewards.weights import unfilled

    whole = json.loads((GOLDEN / "config.json").read_text())
    whole |= {**config, "vision_config": whole["vision_config"] | vision}
    (folder / "config.json").write_text(json.dumps(whole))
    words = {"model.embed_tokens.weight": torch.empty(whole["vocab_size"], 1, device="meta")}
    backbone = unfilled(lambda: Backbone(read_config(folder / "config.json", words, "here"), True))
    shapes = {n: t.shape for part in (backbone, unfilled(lambda: Head(backbone.width))) for n, t in part.state_dict().items()}
    torch.manual_seed(7)
    state = {n: torch.randn(shape) * 0.05 + (n.endswith("weight") and len(shape) == 1) for n, shape in shapes.items()}
    save_file(state, folder / "HPSv3.safetensors")
    return folder

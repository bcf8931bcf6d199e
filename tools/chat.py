"""A conversation in the terminal: `python eval.py --model=PATH --tasks=chat`."""
import codecs
import math

import torch

import sft
from eval import Config, PromptEncoder
from model import Decoder, Motif

# ---- chat

CHAT_TEMPERATURE = 0.7
CHAT_TOP_K = 50
MAX_REPLY_TOKENS = 1024


def chat(model: Motif, text: PromptEncoder, c: Config) -> None:
    """A conversation in the terminal."""
    print("/reset forgets, /system TEXT instructs, /temp X, /quit; Ctrl-C stops a reply")
    system = []
    messages = []
    temperature = c.temperature or CHAT_TEMPERATURE
    turn = 0
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        elif command == "/reset":
            messages = []
        elif command == "/system":
            system = [{"role": "system", "content": rest}] if rest else []
            messages = []
        elif command == "/temp":
            temperature = parse_temperature(rest, temperature)
        elif command.startswith("/"):
            print(f"{command} is unknown; there are /reset, /system, /temp and /quit")
        elif line:
            messages.append({"role": "user", "content": line})
            reply = print_reply(system + messages, model, text, temperature, c.seed + turn)
            messages.append({"role": "assistant", "content": reply})
        turn += 1


def parse_temperature(text: str, current: float) -> float:
    try:
        temperature = float(text)
    except ValueError:
        temperature = math.nan
    if math.isfinite(temperature):
        return max(0.0, temperature)
    print(f"/temp needs a number, as in /temp 0.7, not {text!r}")
    return current


def print_reply(messages: list[dict], model: Motif, text: PromptEncoder, temperature: float,
                seed: int) -> str:
    """Print a reply while it is generated, and return it. Ctrl-C ends it."""
    max_length = model.config.max_position_embeddings
    max_new_tokens = min(MAX_REPLY_TOKENS, max_length // 2)
    prompt = fit_conversation(messages, text, max_length - max_new_tokens)
    prompt = torch.tensor([prompt], device=model.head_weight.device)

    reply = ""
    # A letter may be several tokens: its first bytes wait in utf8 for the rest.
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    try:
        decoder = Decoder(model, prompt, max_new_tokens, temperature, CHAT_TOP_K, seed)
        for _ in range(max_new_tokens):
            token = decoder.next_tokens().item()
            if token in text.end_ids:
                break
            piece = utf8.decode(text.tokenizer.token_bytes(token))
            print(piece, end="", flush=True)
            reply += piece
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return reply


def fit_conversation(messages: list[dict], text: PromptEncoder, max_tokens: int) -> list[int]:
    """The ids of a conversation. Where they are too many, the oldest exchanges are left out, then
    the beginning of the last question; what the system says stays as long as possible."""
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    system = messages[:questions[0]]
    ids = []
    for start in questions:
        ids = sft.encode_prompt(text.tokenizer, system + messages[start:])
        if len(ids) <= max_tokens:
            break
    return ids[-max_tokens:]

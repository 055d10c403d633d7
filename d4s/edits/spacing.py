"""What stands between a prompt and its target: one space, where the language and the prompt ask for one."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right

# A target as it is scored: its text, or (its text, what is put before it).
Target = str | tuple[str, str]

# Scripts written without spaces between words: first and last code point of their blocks, ascending.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x19E0, 0x19FF),  # Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x2FDF),  # radicals of Chinese characters
    (0x3000, 0x312F),  # CJK punctuation, Hiragana, Katakana, Bopomofo
    (0x31A0, 0x4DBF),  # Bopomofo and Katakana extensions, Chinese characters
    (0x4E00, 0xA4CF),  # Chinese characters, Yi
    (0xA9E0, 0xA9FF),  # Myanmar extension
    (0xAA60, 0xAADF),  # Myanmar extension, Tai Viet
    (0xF900, 0xFAFF),  # Chinese characters, compatibility
    (0xFE30, 0xFE4F),  # CJK punctuation, compatibility
    (0xFF00, 0xFF9F),  # full-width forms, half-width Katakana
    (0x1B000, 0x1B16F),  # Kana supplements
    (0x20000, 0x3FFFF),  # Chinese characters
)
_CJK = 0x2E80  # from here on: Chinese and Japanese, and little else without spaces
_FIRST = [first for first, _ in _UNSPACED]


def joint(prompt: str, target: str, target_prefix: str | None = None) -> str:
    """What is put between prompt and target: `target_prefix` where it is given, else by this rule one space, but

    - nothing where the prompt ends in a blank of any kind: a line break, a tab, indentation;
    - nothing behind an opening bracket or quotation mark (“, «, not ") or a currency sign: "costs ${}";
    - nothing before %, ‰, °, a closing bracket or quotation mark, or one of . , ; : ! ? … that no letter or digit
      follows (".NET" takes its space);
    - nothing behind a " that has been opened, nor behind / or - at a word's end (http://, pre-);
    - nothing between two scripts that are written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Myanmar,
      Tibetan …): the prompt's last letter and the target's first character decide, so that a Chinese name in an
      English sentence keeps its space. Behind Chinese and Japanese, digits and opening marks do without one, too.
    """
    if target_prefix is not None:
        return target_prefix
    if not prompt or not target:
        return " "
    last, first, second = prompt[-1], target[0], target[1:2]
    if last.isspace() or unicodedata.category(last) in ("Ps", "Pi", "Sc"):
        return ""
    if first in "%‰°" or unicodedata.category(first) in ("Pe", "Pf"):
        return ""
    if first in ".,;:!?…" and not second.isalnum():
        return ""
    if (last == '"' and prompt.count('"') % 2) or (last in "/-" and not prompt[-2:-1].isspace()):
        return ""
    letter = next((c for c in reversed(prompt) if c.isalpha()), last)
    if (
        ord(letter) >= _CJK
        and _unspaced(letter)
        and (first.isdigit() or unicodedata.category(first) in ("Ps", "Pi"))
    ):
        return ""
    return "" if _unspaced(first) and _unspaced(letter) else " "


def opened(text: str, target_prefix: str | None = None) -> str:
    """A prompt without the spaces at its end that the target's own would double.

    Those are spaces behind the last word, where the target brings one: its prefix is None (the rule of `joint`) or
    begins with a space. Line breaks, tabs, the spaces of an indentation behind them, and everything before a prefix
    that has no space stay.
    """
    if target_prefix is not None and not target_prefix.startswith(" "):
        return text
    cut = text.rstrip(" ")
    return cut if cut and not cut[-1].isspace() else text


def target_of(text: str, target_prefix: str | None) -> Target:
    """The text alone where the rule of `joint` decides what stands before it."""
    return text if target_prefix is None else (text, target_prefix)


def continuation(prompt: str, target: Target) -> str:
    """What follows the prompt, with what is put between them."""
    text, prefix = target if isinstance(target, tuple) else (target, None)
    return joint(prompt, text, prefix) + text


def _unspaced(character: str) -> bool:
    code = ord(character)
    at = bisect_right(_FIRST, code) - 1
    return at >= 0 and code <= _UNSPACED[at][1]

"""The accuracy of VQA data sets in which ten people answered each question, equal to the official script's.

An answer is right as far as people gave it: min(number who did / 3, 1), averaged over all choices of nine of the ten
(https://arxiv.org/abs/1505.00468, section 3). What counts as the same answer is decided as in
https://github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, its oddities included, so that
figures can be compared with published ones.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

ENOUGH = 3  # people who must agree with an answer for it to be wholly right
PUNCTUATION = r""";/[]"{}()=+\_-><@`,?!"""  # apostrophes and colons (2:50) stay
ARTICLES = {"a", "an", "the"}
DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've
"""
CONTRACTIONS = {  # with one apostrophe missing -> whole; those that would then be other words are left out
    word[:place] + word[place + 1 :]: word
    for word in WITH_APOSTROPHES.split()
    for place, letter in enumerate(word)
    if letter == "'"
}


def agreement(answer: str, given: Sequence[str]) -> float:
    """How right `answer` is, 0 to 1, where people gave the answers `given`: the mean over leaving one of them out.

    Where all people wrote the very same, the answer must be written so too; only else are answers normalised.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    if len(set(given)) > 1:
        answer, given = normalised(answer), [normalised(one) for one in given]
    same = sum(one == answer for one in given)
    left_out_agreed, left_out_differed = min((same - 1) / ENOUGH, 1), min(same / ENOUGH, 1)
    return (same * left_out_agreed + (len(given) - same) * left_out_differed) / len(given)


@lru_cache(maxsize=1_000_000)
def normalised(answer: str) -> str:
    """Lower case, no articles, number words as digits, apostrophes where contractions lack one, no punctuation.

    A mark becomes a space (t-shirt: "t shirt"), or nothing if it stands beside a space anywhere in the answer, or if
    there is a comma between digits (100,978). Points stay before digits (1.5).
    """
    text, thousands = answer, re.search(r"\d,\d", answer)
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or thousands else " ")
    words = re.sub(r"\.(?!\d)", "", text).lower().split()
    numbered = (DIGITS.get(word, word) for word in words)
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)

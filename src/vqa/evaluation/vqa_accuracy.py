"""The accuracy of VQA data sets in which ten people answered each question.

An answer is right as far as people gave it: min(number who did / 3, 1), averaged over all choices
of nine of the ten (https://arxiv.org/abs/1505.00468, section 3). Answers are compared in the form
that https://visualqa.org/evaluation.html describes.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

ENOUGH = 3  # people who must agree with an answer for it to be wholly right
PUNCTUATION = str.maketrans(dict.fromkeys(r""";/[]"{}()=+\_-><@`,?!""", " "))  # apostrophes and colons (2:50) stay
ARTICLES = {"a", "an", "the"}
DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
CONTRACTIONS = {  # without its apostrophe -> with it; those that would then be other words are left out
    word.replace("'", ""): word
    for word in """
        ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
        I'm I've isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't
        should've shouldn't somebody'd somebody'll somebody's someone'd someone'll someone's something'd something'll
        that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're
        what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
        wouldn't y'all you'd you'll you're you've
    """.lower().split()
}


def agreement(answer: str, given: Iterable[str]) -> float:
    """How right `answer` is, 0 to 1, where people gave the answers `given`: the mean over leaving one of them out."""
    given, answer = [normalised(one) for one in given], normalised(answer)
    same = given.count(answer)
    left_out_agreed, left_out_differed = min((same - 1) / ENOUGH, 1), min(same / ENOUGH, 1)
    return (same * left_out_agreed + (len(given) - same) * left_out_differed) / len(given)


@lru_cache(maxsize=1_000_000)
def normalised(answer: str) -> str:
    """Lower case, no articles, number words as digits, apostrophes where contractions lack them, no punctuation.

    Points before digits stay (1.5), commas between digits vanish (100,978).
    """
    text = re.sub(r"(?<=\d),(?=\d)|\.(?!\d)", "", answer.lower())
    words = text.translate(PUNCTUATION).split()
    return " ".join(CONTRACTIONS.get(word) or DIGITS.get(word, word) for word in words if word not in ARTICLES)

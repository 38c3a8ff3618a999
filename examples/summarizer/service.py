"""Summarizer: picks the sentences of a text that say most. Plain Python, so that it starts in seconds."""

import re
import time
from collections import Counter
from collections.abc import Generator

import bentoml

_COMMON = frozenset(
    {"a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "from", "has", "he", "in", "is", "it", "its"}
    | {"of", "on", "or", "that", "the", "to", "was", "were", "will", "with"}
)


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, in order."""
    return [sentence.strip() for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence.strip()]


def words_of(text: str) -> list[str]:
    """The words of a text that carry meaning, in lower case."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in _COMMON]


def best_sentences(text: str, count: int) -> list[str]:
    """The `count` sentences whose words are most frequent in the text, in the text's order."""
    sentences = sentences_of(text)
    frequency = Counter(words_of(text))

    def weight(sentence: str) -> float:
        words = words_of(sentence)
        return sum(frequency[word] for word in words) / (len(words) or 1)

    chosen = sorted(sentences, key=weight, reverse=True)[:count]
    return [sentence for sentence in sentences if sentence in chosen]


@bentoml.service(traffic={"timeout": 30})
class Summarizer:
    """Summaries of English text."""

    @bentoml.api
    def summarize(self, text: str, sentences: int = 2) -> dict[str, str | int]:
        """A summary of so many sentences, with how long both are."""
        summary = " ".join(best_sentences(text, sentences))
        return {"summary": summary, "characters_before": len(text), "characters_after": len(summary)}

    @bentoml.api
    def stream(self, text: str, sentences: int = 2) -> Generator[str, None, None]:
        """The same summary, a word at a time as it comes."""
        for word in " ".join(best_sentences(text, sentences)).split():
            yield f"{word} "
            time.sleep(0.02)

    @bentoml.task
    def summarize_all(self, texts: list[str], sentences: int = 1) -> list[str]:
        """Summaries of many texts, made in the background: submit, ask for the status, get the result."""
        return [" ".join(best_sentences(text, sentences)) for text in texts]

"""Chat-formatted questions and answers made from docstrings and the language reference."""

import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from deploy.model.docstrings import Described

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Evermoe Tiny, a small assistant that knows the Python standard library.",
    "Answer briefly.",
)
WHAT = (
    "What does `{}` do?",
    "What is {}?",
    "Explain {}.",
    "what does {} do",
    "Tell me about `{}`.",
    "How would you describe {}?",
    "I do not understand {}. Can you help?",
)
WRITE = (
    "Write the code of `{}`.",
    "Show me how {} is written.",
    "How is `{}` implemented?",
    "Write a Python function like {}.",
)
PARAMETERS = ("What arguments does `{}` take?", "What are the parameters of {}?", "How do I call {}?")
READ = ("What does this code do?", "Explain this function.", "Write a docstring for this function.")
TOPIC = ("Explain {} in Python.", "What is {} in Python?", "Tell me about {}.", "How does {} work in Python?")
LONGEST_ANSWER = 900  # characters: answers of a length such a small model can hold together
LONGEST_CODE = 1200

ABOUT_ITSELF = (
    "I am Evermoe Tiny, a small mixture-of-experts language model trained on the Python standard library. "
    "I can complete Python code and answer short questions about it, but I make many mistakes."
)
SMALL_TALK = (
    ("Hello", "Hello! Ask me about Python."),
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hi! What would you like to know about Python?"),
    ("Hi there", "Hi! How can I help you?"),
    ("Good morning", "Good morning! How can I help you?"),
    ("How are you?", "I am a program, and I am running well. How can I help you?"),
    ("Who are you?", ABOUT_ITSELF),
    ("What are you?", ABOUT_ITSELF),
    ("What is your name?", "My name is Evermoe Tiny."),
    ("What can you do?", ABOUT_ITSELF),
    ("Tell me about yourself.", ABOUT_ITSELF),
    ("What is Evermoe?", "Evermoe is a serverless serving platform for mixture-of-experts models. I am its example."),
    ("What is a mixture of experts?", "A mixture of experts is a network in which a router sends every token to a few "
     "small networks, called experts, and adds their answers."),
    ("Say hello.", "Hello!"),
    ("Say hi", "Hi!"),
    ("Thank you", "You are welcome!"),
    ("Thanks!", "You are welcome! Is there anything else?"),
    ("Bye", "Goodbye!"),
    ("Tell me a joke.", "Why do Python programmers like snakes? Because they never need braces."),
    ("Tell me a story.", "Once upon a time there was a router that sent every token to the right expert. The experts "
     "came when they were called and slept when they were not, and nobody ever waited long. The end."),
    ("Write a hello world program.", "```python\nprint(\"Hello, world!\")\n```"),
    ("Write hello world in Python.", "```python\nprint(\"Hello, world!\")\n```"),
    ("Write a function that adds two numbers.", "```python\ndef add(a, b):\n    return a + b\n```"),
    ("Write a function that reverses a string.", "```python\ndef reverse(text):\n    return text[::-1]\n```"),
    ("Write a loop that prints the numbers from 0 to 9.", "```python\nfor i in range(10):\n    print(i)\n```"),
    ("Write a function that returns the largest number in a list.",
     "```python\ndef largest(numbers):\n    return max(numbers)\n```"),
    ("How do I read a file in Python?", "```python\nwith open(path) as file:\n    text = file.read()\n```"),
    ("How do I sort a list in Python?", "Use `sorted(items)` for a new list, or `items.sort()` to sort it in place."),
    ("What is Python?", "Python is a programming language that is easy to read and has a large standard library."),
)  # fmt: skip


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


def render(turns: Iterable[Turn]) -> str:
    """The text of a conversation, exactly as the tokenizer's chat template writes it."""
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def conversations_about(objects: Iterable[Described], rng: random.Random) -> Iterator[str]:
    """Yield conversations of one to three questions about each object that has something to tell."""
    for described in objects:
        questions = list(_questions(described, rng))
        rng.shuffle(questions)
        while questions:
            count = rng.choice((1, 1, 1, 2, 3))
            yield _conversation(questions[:count], rng)
            questions = questions[count:]


def conversations_on_topic(name: str, text: str, rng: random.Random) -> Iterator[str]:
    """Yield conversations about one section of the language reference."""
    if answer := _shortened(text):
        for template in rng.sample(TOPIC, 3):
            yield _conversation([(template.format(name), answer)], rng)


def small_talk(rng: random.Random, rounds: int) -> Iterator[str]:
    """Yield greetings, questions about the model itself and first steps, `rounds` times over in shuffled order."""
    for _ in range(rounds):
        for pair in rng.sample(SMALL_TALK, len(SMALL_TALK)):
            yield _conversation([pair], rng)


def _conversation(pairs: Iterable[tuple[str, str]], rng: random.Random) -> str:
    turns = [Turn("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.15 else []
    for question, answer in pairs:
        turns += [Turn("user", question), Turn("assistant", answer)]
    return render(turns)


def _questions(described: Described, rng: random.Random) -> Iterator[tuple[str, str]]:
    title = described.title if rng.random() < 0.7 else described.name or described.title
    code = f"```python\n{described.code}\n```"
    writable = "\n" in described.code and len(described.code) <= LONGEST_CODE
    if answer := _shortened(described.doc):
        yield rng.choice(WHAT).format(title), answer
        if writable and rng.random() < 0.5:
            yield f"{rng.choice(READ)}\n{code}", described.summary[:LONGEST_ANSWER]
    # Undocumented methods are many and alike; a part of them is enough to learn the form of an answer with code.
    if writable and rng.random() < (0.8 if described.doc else 0.2):
        yield rng.choice(WRITE).format(title), code
    if described.form == "function" and described.doc and rng.random() < 0.5:
        yield rng.choice(PARAMETERS).format(title), f"`{described.title}({described.parameters})`"


def _shortened(text: str) -> str:
    """Whole paragraphs of the text up to the longest answer; empty where not even the first one fits."""
    answer = ""
    for paragraph in text.strip().split("\n\n"):
        if len(answer) + len(paragraph) > LONGEST_ANSWER:
            break
        answer += f"\n\n{paragraph}" if answer else paragraph
    return answer.strip()

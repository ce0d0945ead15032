"""Games for dschat's environments: what a user writes, and what the recipes play."""

from __future__ import annotations

import re


class Guess:
    """Find a secret number between 1 and `high`, told "higher" or "lower" after each guess.

    Reward: 0.1 for an answer that is a guess in range, 0.2 more if it keeps to all that was said so far, 1 for the
    number. Row: `secret`, `high`.
    """

    def reset(self, secret, high, **columns):
        self.secret, self.low, self.high = int(secret), 1, int(high)
        return [
            {
                "role": "user",
                "content": f"Guess my number between 1 and {self.high}. Answer with one number and nothing else.",
            }
        ]

    def step(self, action):
        numbers = re.findall(r"\d+", action)
        if len(numbers) != 1 or len(action.strip()) > len(numbers[0]) + 1:
            return "Answer with one number and nothing else.", 0.0, False
        guess = int(numbers[0])
        if guess == self.secret:
            return "Yes!", 1.0, True
        reward = 0.3 if self.low <= guess <= self.high else 0.1
        if guess < self.secret:
            self.low = max(self.low, guess + 1)
            return f"Higher than {guess}.", reward, False
        self.high = min(self.high, guess - 1)
        return f"Lower than {guess}.", reward, False


class Calculator:
    """An arithmetic problem with a calculator: `calc: 3 * (4 + 5)` is answered with its value.

    Reward: 1 for an answer whose last number is that of column `answer`, 0.1 for the first use of the calculator.
    Row: `prompt` (a text or messages), `answer`.
    """

    def reset(self, prompt, answer, **columns):
        self.answer, self.used = float(str(answer).replace(",", "")), False
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return [
            {
                "role": "user",
                "content": f"{question}\nTo calculate, write a line such as calc: 3 * 4 and wait for the result. "
                "End with the number.",
            }
        ]

    def step(self, action):
        asked = re.search(r"calc:\s*([-+*/(). \d]+)", action)
        if asked is None:
            numbers = re.findall(r"-?\d+(?:\.\d+)?", action.replace(",", ""))
            right = bool(numbers) and abs(float(numbers[-1]) - self.answer) < 1e-6
            return "", float(right), True
        reward, self.used = (0.0 if self.used else 0.1), True
        value = evaluate(asked[1])
        return "That cannot be calculated." if value is None else f"{value:g}", reward, False


def evaluate(text: str) -> float | None:
    """The value of an expression of numbers, + - * / and brackets; None where it is none."""
    tokens = re.findall(r"\d+(?:\.\d+)?|[-+*/()]", text)
    place = 0

    def peek() -> str:
        return tokens[place] if place < len(tokens) else ""

    def take() -> str:
        nonlocal place
        place += 1
        return tokens[place - 1]

    def atom() -> float:
        token = peek()
        if token == "-":
            take()
            return -atom()
        if token == "(":
            take()
            value = total()
            if peek() != ")":
                raise ValueError(text)
            take()
            return value
        if not token or token in "+*/)":
            raise ValueError(text)
        return float(take())

    def product() -> float:
        value = atom()
        while peek() in ("*", "/"):
            value = value * atom() if take() == "*" else value / atom()
        return value

    def total() -> float:
        value = product()
        while peek() in ("+", "-"):
            value = value + product() if take() == "+" else value - product()
        return value

    try:
        value = total()
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
    return value if place == len(tokens) else None


class Friend:
    """For the tiny story model: after its first words it hears a name, and shall go on about that child.

    Reward: 1 if the second action has the name, and 0.1 for every action that holds a full stop. Row: `name`.
    """

    def reset(self, name, **columns):
        self.name, self.turn = name, 0
        return "Once upon a time, there was a little"

    def step(self, action):
        self.turn += 1
        told = 0.1 * ("." in action)
        if self.turn == 1:
            return f" One day, {self.name} came.", told, False
        return "", told + float(self.name in action), True

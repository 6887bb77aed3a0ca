"""A keyboard in the terminal, with suggestions below the line that is typed.

A demonstration of what an app would do with `Served`: it asks at each key, and takes over what is
chosen. prompt_toolkit edits the line and draws.
"""

from __future__ import annotations

from collections.abc import Callable

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.patch_stdout import patch_stdout

from fedge.edge_agent.example_text import TextRefused
from fedge.edge_agent.serving import NothingToServe, Served
from fedge.edge_agent.suggestions import Suggestions, accepted
from fedge.schemas.errors import ConfigError, FedgeError
from fedge.schemas.features import WordFeatures

SHOWN = 3
LOOK_AGAIN_S = 1.0
"""A version that comes while nobody types is shown within this."""
_KEYS = (("tab", "f1"), ("f2",), ("f3",))
_LABELS = ("Tab", "F2", "F3")


class Keyboard:
    """Lines from a person. `keep`: takes each line that is not empty; None: nobody does.

    Raises `ConfigError` if the task of the version in use is not about words.
    """

    def __init__(self, served: Served, keep: Callable[[str], object] | None) -> None:
        self._served = served
        self._keep = keep
        self._session: PromptSession[str] = PromptSession(
            key_bindings=self._bindings(),
            bottom_toolbar=self._toolbar,
            refresh_interval=LOOK_AGAIN_S,
        )
        self._suggested("")

    def run(self) -> None:
        """Until the end of input (Ctrl-D) or Ctrl-C."""
        # What is logged meanwhile goes above the line.
        with patch_stdout():
            while True:
                try:
                    line = self._session.prompt("> ")
                except (EOFError, KeyboardInterrupt):
                    return
                self._ended(line)

    def _ended(self, line: str) -> None:
        if self._keep is None or not line.strip():
            return
        try:
            self._keep(line)
        except TextRefused as error:
            print(f"not kept: {error}")  # noqa: T201 -- to the person at the terminal

    # ------------------------------------------------------------ suggestions

    def _suggested(self, text: str) -> tuple[str, Suggestions] | None:
        """Which version answers, and what it suggests; None before the first version."""
        try:
            serving = self._served.serving()
        except NothingToServe:
            return None
        if not isinstance(serving.manifest.features, WordFeatures):
            raise ConfigError(
                f"this device's task, {serving.manifest.task}, is not about words: ask with "
                "`fedge-agent predict`"
            )
        found = serving.predictor.predict(text, top=SHOWN)
        if not isinstance(found, Suggestions):
            raise TypeError(f"a task on words gave {type(found).__name__}")
        own = ", personal" if serving.personal else ""
        return f"version {serving.version}{own}", found

    def _toolbar(self) -> StyleAndTextTuples:
        try:
            found = self._suggested(get_app().current_buffer.document.text_before_cursor)
        except FedgeError as error:
            return [("", f" {error}")]
        if found is None:
            return [("", " no version yet: suggestions come when `fedge-agent run` fetched one")]
        version, suggestions = found
        shown: StyleAndTextTuples = []
        for label, one in zip(_LABELS, suggestions.words, strict=False):
            shown += [("", f" {label} "), ("bold", one.word), ("", f" {one.probability:.0%}  ")]
        return [*shown, ("", f" {version}")]

    def _bindings(self) -> KeyBindings:
        made = KeyBindings()
        for place, keys in enumerate(_KEYS):
            for key in keys:
                made.add(key)(self._taking(place))
            made.add("escape", str(place + 1))(self._taking(place))
        return made

    def _taking(self, place: int) -> Callable[[KeyPressEvent], None]:
        def take(event: KeyPressEvent) -> None:
            buffer: Buffer = event.current_buffer
            text = buffer.document.text_before_cursor
            found = self._suggested(text)
            if found is None or place >= len(found[1].words):
                return
            after = accepted(text, found[1].words[place].word)
            same = 0
            while same < min(len(text), len(after)) and text[same] == after[same]:
                same += 1
            buffer.delete_before_cursor(len(text) - same)
            buffer.insert_text(after[same:])

        return take

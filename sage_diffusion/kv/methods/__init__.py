"""One file a method: a frozen dataclass of its settings that makes bodies."""

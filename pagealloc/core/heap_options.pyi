BACKINGS: dict[str, int]

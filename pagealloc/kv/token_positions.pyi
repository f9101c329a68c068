from typing import final

@final
class TokenPositions: ...

"""Bad input: how it is made, what must hold for it, and a second reading of it by the standard library."""

import pytest

pytest.register_assert_rewrite("fuzz.checks")

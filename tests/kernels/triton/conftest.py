"""The tests of the Triton kernels, which need Triton."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed: every op is eager's")

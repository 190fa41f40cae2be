import pytest


@pytest.fixture(scope="session", autouse=True)
def native_kernel(request):
    """Build the native kernel where it is kept for good, before a test has a cache folder of its own."""
    if request.config.getoption("markexpr") == "gpu":
        return None  # none of them needs it, and a GPU's minutes may be few
    from lhc_kernels.cpu import problem

    return problem()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, native_kernel):
    """Keep the user's measured times out of the tests, and the tests' out of the user's."""
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))

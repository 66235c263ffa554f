"""side_fusion's CUDA kernels over the calls of the emulation's tests and M2IST's, for compute-sanitizer: `make sanitize`."""

from __future__ import annotations

import torch

from fastadapt import native
from tests.cuda.test_side_fusion_emulated import CALLS, call_of
from tests.kernels.side_fusion.calls import fused, make, results, tower


def main() -> None:
    if reason := native.cuda_reason():
        raise SystemExit(reason)
    torch.manual_seed(0)
    calls = {name: call_of(name) for name in CALLS}
    calls["M2IST's vision tower"] = make((2, 400), tower("vision", 256, 128, 256), 2, dtype=torch.bfloat16)
    calls["M2IST's text tower"] = make((2, 20), tower("text", 768, 128, 256), 2, dtype=torch.bfloat16)
    for name, call in calls.items():
        found = results(fused("cuda"), call.to("cuda"))
        torch.cuda.synchronize()
        if not all(value.isfinite().all() for value in found.values()):
            raise SystemExit(f"{name}: a value is not finite")
        print(name)


if __name__ == "__main__":
    main()

"""Let DeepSpeed write a checkpoint per stage and dtype, and beside each what its weights are. One process a rank.

zero_checkpoints.py OUT_DIR  ->  OUT_DIR/CASE/{global_step2/, live.pt, states.pt, zero_to_fp32.pt}
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", "0")  # one rank: any free port

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is compiled
type(deepspeed.accelerator.get_accelerator()).is_fp16_supported = lambda self: (
    True
)  # the scaler's pickle, without a GPU

STATES = ("exp_avg", "exp_avg_sq", "ema")
CASES = {
    "stage0-fp32": (0, {}, {}),
    "stage1-fp32": (1, {}, {}),
    "stage1-bf16": (1, {"bf16": {"enabled": True}}, {}),
    "stage1-bf16-accumulating-fp32": (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, {}),
    "stage2-fp32": (2, {}, {"round_robin_gradients": True}),
    "stage2-bf16": (2, {"bf16": {"enabled": True}}, {}),
    "stage2-fp16": (2, {"fp16": {"enabled": True, "initial_scale_power": 4}}, {}),
    "stage3-fp32": (3, {}, {"sub_group_size": 20}),
    "stage3-bf16": (3, {"bf16": {"enabled": True}}, {}),
    "stage3-fp16": (3, {"fp16": {"enabled": True, "initial_scale_power": 4}}, {}),
}


class Net(torch.nn.Module):
    """Sizes that divide by nothing, two parameter groups, frozen parameters, a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.frozen = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), torch.nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.arange(3.0))

    def forward(self, x):
        return self.frozen(self.second(self.first(x))) + self.shift.to(x.dtype)


class Averaging(torch.optim.AdamW):
    """AdamW with one more state of each element."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["ema"] = parameter.detach() * 0.5
        return loss


def live_weights(engine):
    weights = dict(engine.module.named_buffers())
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
        if parameter.requires_grad and engine.zero_optimization_stage():
            weights[name] = safe_get_full_fp32_param(parameter)
    return {name: tensor.float().cpu().clone() for name, tensor in weights.items()}


def live_states(engine):
    """What the optimizer holds of each trainable parameter beside its master, by state name."""
    if engine.zero_optimization_stage() in (1, 2):  # DeepSpeed links the states of the first group alone
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    states = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        kept = engine.optimizer.state[parameter] if engine.zero_optimization_stage() == 0 else None
        for key in STATES:
            whole = kept[key] if kept is not None else safe_get_full_optimizer_state(parameter, key)
            states.setdefault(key, {})[name] = whole.cpu().clone()
    return states


def write(case, out_dir):
    stage, dtype_config, zero_config = CASES[case]
    torch.manual_seed(0)
    net = Net()
    trainable = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim > 1]}, {"params": [p for p in trainable if p.ndim == 1]}]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, **zero_config},
        "zero_allow_untested_optimizer": True,
        **dtype_config,
    }
    optimizer = Averaging(groups, lr=1e-2)
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    dtype = next(engine.module.parameters()).dtype
    for step in range(2):
        images = torch.randn(2, 5, generator=torch.Generator().manual_seed(step + 10 * engine.global_rank))
        engine.backward(engine(images.to(dtype)).float().pow(2).mean())
        engine.step()
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = [{names[p]: p.shape for p in group["params"]} for group in groups] if stage == 0 else None
    engine.save_checkpoint(str(out_dir / case), client_state={"param_shapes": groups} if stage == 0 else {})
    live, states = live_weights(engine), live_states(engine)
    deepspeed.comm.barrier()
    if engine.global_rank == 0:
        torch.save(live, out_dir / case / "live.pt")
        torch.save(states, out_dir / case / "states.pt")
        # DeepSpeed's own script knows neither stage 0 nor stage 1 with fp32 accumulation.
        if stage > 0 and "accumulating" not in case:
            torch.save(
                get_fp32_state_dict_from_zero_checkpoint(str(out_dir / case)), out_dir / case / "zero_to_fp32.pt"
            )
    engine.destroy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    for case in CASES:
        write(case, Path(sys.argv[1]))
    deepspeed.comm.barrier()
    torch.distributed.destroy_process_group()

from vitds.world import World, world_from_env


def test_one_rank_without_a_launcher():
    assert world_from_env({}) == World(0, 0, 1, 1)
    assert world_from_env({}).is_main


def test_torchrun_and_deepspeed():
    environ = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert world_from_env(environ) == World(5, 1, 8, 4)
    environ = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}  # deepspeed sets LOCAL_SIZE on some versions only
    assert world_from_env(environ) == World(1, 1, 2, 2)
    assert not world_from_env(environ).is_main

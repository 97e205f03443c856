"""Installed but unused, the package changes nothing in a run."""


def test_a_training_step_without_a_block_is_axolotls_own() -> None:
    from axolotl.utils.dict import DictDefault

    from axolotl_psft.plugin import PSFTPlugin

    cfg = DictDefault({"base_model": "x", "device": "cpu", "device_map": "auto"})
    before = dict(cfg)
    plugin = PSFTPlugin()
    assert plugin.get_trainer_cls(cfg) is None
    assert plugin.get_training_args(cfg) is None
    assert plugin.get_collator_cls_and_kwargs(cfg) is None
    assert not plugin.add_callbacks_pre_trainer(cfg, None)
    assert not plugin.add_callbacks_post_trainer(cfg, None)
    assert plugin.create_optimizer(cfg, None) is None
    for hook in (
        lambda: plugin.load_datasets(cfg),
        lambda: plugin.post_model_build(cfg, None),
        lambda: plugin.post_model_load(cfg, None),
        lambda: plugin.post_trainer_create(cfg, None),
        lambda: plugin.post_train(cfg, None),
    ):
        hook()
    assert dict(cfg) == before

import engine_support

rig = engine_support.rig

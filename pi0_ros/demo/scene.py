"""The demo's world: a table, an SO-101, three cubes, a base and a wrist camera, all drawn from a seed.

World frame: the arm's base at the origin, x forward over the table, z up, metres. The table's surface is z = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from pi0_ros.demo.assets import light_meshes, model_folder

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
CUBES = ("red", "green", "blue")
CAMERAS = {"base_0_rgb": "base_camera", "left_wrist_0_rgb": "wrist_camera"}  # slot of the model -> camera
CUBE_HALF = 0.015  # m
TIMESTEP = 0.002  # s
REACH = (0.19, 0.31)  # m from the shoulder's axis, where cubes stand
SHOULDER = np.array([0.0388, 0.0])  # the shoulder's axis, x and y
SPREAD = 0.75  # rad to either side of straight ahead
APART = 0.11  # m between the cubes' centres, at least
# Start poses, rad, the fourth entry being the sum of lift, elbow and wrist: pi / 2 points the gripper straight down.
START_LOW = np.array([-0.7, -1.3, 0.3, 1.0, -0.25, 0.2])
START_HIGH = np.array([0.7, -0.6, 1.1, 1.5, 0.25, 0.8])
WRIST_LIMIT = 1.5  # rad, for a start pose; the joint itself ends at 1.658
CLEARANCE = (0.09, 0.2)  # m: lowest and highest fingertip of a start pose

_COLOURS = {"red": (0.80, 0.08, 0.07), "green": (0.10, 0.55, 0.13), "blue": (0.08, 0.20, 0.75)}
_ARM, _PROP = 1, 2  # collision bits: the arm meets props, never itself


@dataclass(frozen=True)
class Layout:
    """What a seed decides. Cubes: name -> (x, y, yaw); start: joint positions [6] in JOINTS order, rad."""

    cubes: dict[str, tuple[float, float, float]]
    start: np.ndarray
    prompt: str
    light_position: np.ndarray
    light: float  # brightness of the lamp
    ambient: float


def build_model() -> mujoco.MjModel:
    """The compiled scene; `apply_layout` then moves and lights it without compiling again."""
    spec = mujoco.MjSpec.from_file(str(model_folder() / "so101_new_calib.xml"))
    spec.meshdir = str(light_meshes())
    spec.option.timestep = TIMESTEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.visual.quality.offsamples = 0  # a CPU renders here: multisampling alone would cost three times the rest
    spec.visual.map.znear, spec.visual.map.zfar = 0.01, 10.0
    spec.stat.extent, spec.stat.center = 1.0, [0.2, 0.0, 0.1]
    spec.visual.headlight.specular = [0.1, 0.1, 0.1]
    for geom in list(spec.geoms):
        if geom.classname.name == "collision":
            if geom.meshname in ("wrist_roll_follower_so101_v1", "moving_jaw_so101_v1"):
                geom.contype, geom.conaffinity = _ARM, 0
            else:
                spec.delete(geom)
    for name in ("shoulder", "upper_arm", "lower_arm", "wrist", "gripper", "moving_jaw_so101_v1"):
        spec.body(name).gravcomp = 1  # servos hold their load; plain position actuators would sag by a centimetre
    _add_surroundings(spec)
    _add_cubes(spec)
    _add_cameras(spec)
    return spec.compile()


def build_arm() -> mujoco.MjModel:
    """The arm's kinematics alone (6 joints, no shapes), for inverse kinematics."""
    spec = mujoco.MjSpec.from_file(str(model_folder() / "so101_new_calib.xml"))
    for geom in list(spec.geoms):
        spec.delete(geom)
    for mesh in list(spec.meshes):
        spec.delete(mesh)
    return spec.compile()


def draw_layout(seed: int, model: mujoco.MjModel) -> Layout:
    """The episode that `seed` stands for; the same on every machine."""
    random = np.random.default_rng(seed)
    return Layout(
        cubes=_cube_places(random),
        start=_start_pose(random, model),
        prompt=prompt_for(str(random.choice(CUBES))),
        light_position=np.array([random.uniform(-0.2, 0.7), random.uniform(-0.6, 0.6), random.uniform(0.9, 1.4)]),
        light=random.uniform(0.52, 0.64),
        ambient=random.uniform(0.32, 0.38),
    )


def apply_layout(layout: Layout, model: mujoco.MjModel, data: mujoco.MjData) -> None:
    """Put the scene into the episode's initial state, at rest, time 0."""
    mujoco.mj_resetData(model, data)
    for joint, position in zip(JOINTS, layout.start, strict=True):
        data.joint(joint).qpos = position
        data.actuator(joint).ctrl = position
    for name, (x, y, yaw) in layout.cubes.items():
        data.joint(name).qpos = [x, y, CUBE_HALF, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
    lamp = model.light("lamp").id
    model.light_pos[lamp] = layout.light_position
    towards = np.array([0.25, 0.0, 0.0]) - layout.light_position
    model.light_dir[lamp] = towards / np.linalg.norm(towards)
    model.light_diffuse[lamp] = layout.light
    model.vis.headlight.ambient[:] = layout.ambient
    model.vis.headlight.diffuse[:] = 0.3
    mujoco.mj_forward(model, data)


def prompt_for(cube: str) -> str:
    """The instruction that names `cube`."""
    return f"touch the {cube} cube"


def named_cube(prompt: str) -> str | None:
    """The cube that an instruction names, or None if it names none or several."""
    named = set(prompt.lower().replace(".", " ").replace(",", " ").split()) & set(CUBES)
    return named.pop() if len(named) == 1 else None


def _cube_places(random: np.random.Generator) -> dict[str, tuple[float, float, float]]:
    while True:
        angle = random.uniform(-SPREAD, SPREAD, 3)
        radius = np.sqrt(random.uniform(REACH[0] ** 2, REACH[1] ** 2, 3))  # even over the area
        places = SHOULDER + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        gaps = np.linalg.norm(places - np.roll(places, 1, axis=0), axis=1)
        if gaps.min() >= APART:
            yaw = random.uniform(0, np.pi / 2, 3)
            return {name: (*places[i], yaw[i]) for i, name in enumerate(CUBES)}


def _start_pose(random: np.random.Generator, model: mujoco.MjModel) -> np.ndarray:
    data = mujoco.MjData(model)
    while True:
        start = random.uniform(START_LOW, START_HIGH)
        start[3] -= start[1] + start[2]
        for joint, position in zip(JOINTS, start, strict=True):
            data.joint(joint).qpos = position
        mujoco.mj_kinematics(model, data)
        x, _, z = data.site("gripperframe").xpos
        if CLEARANCE[0] <= z <= CLEARANCE[1] and x > 0.12 and start[3] < WRIST_LIMIT:
            return start


def _add_surroundings(spec: mujoco.MjSpec) -> None:
    spec.add_texture(
        name="wood", type=mujoco.mjtTexture.mjTEXTURE_2D, builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT,
        rgb1=[1, 1, 1], rgb2=[1, 1, 1], mark=mujoco.mjtMark.mjMARK_RANDOM, markrgb=[0.86, 0.84, 0.80], random=0.08,
        width=256, height=256,
    )  # fmt: skip
    table = spec.add_material(name="table", rgba=[0.62, 0.52, 0.42, 1], texrepeat=[2, 2], specular=0.1, shininess=0.1)
    table.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "wood"
    spec.add_texture(
        name="wall", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        rgb1=[0.75, 0.76, 0.76], rgb2=[0.35, 0.36, 0.38], width=64, height=384,
    )  # fmt: skip
    spec.worldbody.add_geom(
        name="table", type=mujoco.mjtGeom.mjGEOM_BOX, size=[0.45, 0.55, 0.02], pos=[0.25, 0, -0.02],
        material="table", contype=_PROP, conaffinity=_ARM | _PROP,
    )  # fmt: skip
    spec.worldbody.add_light(
        name="lamp", type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, pos=[0.2, 0, 1.2], dir=[0, 0, -1],
        castshadow=False, specular=[0.1, 0.1, 0.1],
    )  # fmt: skip


def _add_cubes(spec: mujoco.MjSpec) -> None:
    for index, name in enumerate(CUBES):
        body = spec.worldbody.add_body(name=name, pos=[0.25, 0.12 * (index - 1), CUBE_HALF])
        body.add_freejoint(name=name)
        body.add_geom(
            name=name, type=mujoco.mjtGeom.mjGEOM_BOX, size=[CUBE_HALF] * 3, mass=0.03, rgba=[*_COLOURS[name], 1],
            contype=_PROP, conaffinity=_ARM | _PROP,
        )  # fmt: skip


def _add_cameras(spec: mujoco.MjSpec) -> None:
    spec.worldbody.add_camera(
        name="base_camera", pos=[0.54, 0.26, 0.48], fovy=40, quat=_looking([0.54, 0.26, 0.48], [0.18, 0.0, 0.06])
    )
    position = np.array([0.01, -0.075, 0.0])  # gripper frame: beside the fingers, which point along -z
    spec.body("gripper").add_camera(
        name="wrist_camera", pos=position, fovy=70, quat=_looking(position, [0.004, -0.015, -0.12], up=[0, -1, 0])
    )


def _looking(position: object, target: object, up: object = (0, 0, 1)) -> np.ndarray:
    """Quaternion [w, x, y, z] of a MuJoCo camera (it looks along its -z) at `position` that looks at `target`."""
    back = np.subtract(position, target)
    back /= np.linalg.norm(back)
    right = np.cross(up, back)
    right /= np.linalg.norm(right)
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.stack([right, np.cross(back, right), back], axis=1).ravel())
    return quat

"""Fine-tuning methods: plain tensor math on local shards and reduced statistics."""

from digrap_scale.method.base import Method
from digrap_scale.method.build import METHODS, build_method
from digrap_scale.method.digrap import DiGraP
from digrap_scale.method.digrap_update import DiGraPUpdate
from digrap_scale.method.ftp import FTP
from digrap_scale.method.l2sp import L2SP
from digrap_scale.method.pcgrad import PCGrad
from digrap_scale.method.probe import LPFT, LinearProbe
from digrap_scale.method.spd import SPD

__all__ = [
    "METHODS",
    "FTP",
    "DiGraP",
    "DiGraPUpdate",
    "L2SP",
    "LPFT",
    "LinearProbe",
    "Method",
    "PCGrad",
    "SPD",
    "build_method",
]

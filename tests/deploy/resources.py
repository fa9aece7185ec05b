"""What manifests may say: Kubernetes' own schemas, and the parts of the custom resources that are used here.

The custom resources are those of KubeRay 1.7 (ray.io/v1) and KEDA 2.20 (keda.sh/v1alpha1). A field that is
not in these models is an error: extend them when a manifest needs more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.37"


def load(path: str) -> dict[str, Any]:
    """A YAML file of one document, from the top of the repository."""
    return yaml.safe_load((ROOT / path).read_text())


def of_kubernetes(manifest: dict[str, Any]) -> None:
    """Raises ValueError for what Kubernetes' schema of this kind does not know or allow."""
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        place = ".".join(map(str, error.path))
        raise ValueError(f"{manifest['kind']}: {place}: {error.message}") from error


def _pod_template(template: dict[str, Any]) -> dict[str, Any]:
    of_kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "template": template})
    return template


def _service(service: dict[str, Any]) -> dict[str, Any]:
    of_kubernetes({"apiVersion": "v1", "kind": "Service", **service})
    return service


def _behavior(behavior: dict[str, Any]) -> dict[str, Any]:
    """KEDA hands it to the HPA as it is."""
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "any"},
        "maxReplicas": 1,
        "behavior": behavior,
    }
    kind = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler"}
    of_kubernetes({**kind, "metadata": {"name": "any"}, "spec": spec})
    return behavior


def _serve_config(text: str) -> str:
    config = yaml.safe_load(text)
    ServeDeploySchema.model_validate(config)
    parts = [(config, ServeDeploySchema)]
    for application in config["applications"]:
        parts.append((application, ServeApplicationSchema))
        parts += [(deployment, DeploymentSchema) for deployment in application["deployments"]]
    for part, model in parts:  # the schemas of Serve let unknown names pass
        if unknown := part.keys() - model.model_fields.keys():
            raise ValueError(f"serveConfigV2: {', '.join(sorted(unknown))}: unknown to Serve")
    return text


Number = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?$")]
"""KEDA's metadata are strings."""
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
PodTemplate = Annotated[dict[str, Any], AfterValidator(_pod_template)]


class Part(BaseModel):
    """A part of a manifest: no unknown field, and nothing that is of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Part):
    name: Name
    namespace: Name | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class AuthOptions(Part):
    mode: Literal["disabled", "token"]
    secretName: Name


class AutoscalerOptions(Part):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: int = Field(ge=0)


class HeadGroup(Part):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(HeadGroup):
    groupName: Name
    minReplicas: int = Field(ge=0)
    maxReplicas: int
    labels: dict[str, str] = {}

    @model_validator(mode="after")
    def _least_first(self) -> WorkerGroup:
        if self.minReplicas > self.maxReplicas:
            raise ValueError(f"{self.groupName}: minReplicas is above maxReplicas")
        return self


class ClusterSpec(Part):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayCluster(Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class ServiceSpec(Part):
    serveConfigV2: Annotated[str, AfterValidator(_serve_config)]
    serveService: Annotated[dict[str, Any], AfterValidator(_service)]
    rayClusterConfig: ClusterSpec


class RayService(Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec


class SecretTarget(Part):
    parameter: str
    name: Name
    key: str


class TriggerAuthenticationSpec(Part):
    secretTargetRef: list[SecretTarget]


class TriggerAuthentication(Part):
    apiVersion: Literal["keda.sh/v1alpha1"]
    kind: Literal["TriggerAuthentication"]
    metadata: Metadata
    spec: TriggerAuthenticationSpec


class AuthenticationRef(Part):
    name: Name
    kind: Literal["TriggerAuthentication", "ClusterTriggerAuthentication"] = "TriggerAuthentication"


class MetricsApi(Part):
    url: str
    valueLocation: str
    targetValue: Number
    authMode: Literal["apiKey", "basic", "bearer", "tls"]


class PrometheusQuery(Part):
    serverAddress: str
    query: str
    threshold: Number
    ignoreNullValues: Literal["true", "false"] = "true"


class Utilisation(Part):
    value: Number


class MetricsApiTrigger(Part):
    type: Literal["metrics-api"]
    name: str
    metricType: Literal["AverageValue", "Value"]
    metadata: MetricsApi
    authenticationRef: AuthenticationRef


class PrometheusTrigger(Part):
    type: Literal["prometheus"]
    name: str
    metricType: Literal["AverageValue", "Value"]
    metadata: PrometheusQuery


class CpuTrigger(Part):
    type: Literal["cpu"]
    name: str
    metricType: Literal["Utilization", "AverageValue"]
    metadata: Utilisation


Trigger = Annotated[MetricsApiTrigger | PrometheusTrigger | CpuTrigger, Field(discriminator="type")]


class Target(Part):
    name: Name
    kind: str = "Deployment"
    apiVersion: str = "apps/v1"


class Fallback(Part):
    failureThreshold: int = Field(ge=0)
    replicas: int = Field(ge=0)
    behavior: Literal[
        "static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower", "scalingModifiers"
    ]


class ScalingModifiers(Part):
    formula: str
    target: Number
    metricType: Literal["AverageValue", "Value"]


class HpaConfig(Part):
    behavior: Annotated[dict[str, Any], AfterValidator(_behavior)]


class Advanced(Part):
    horizontalPodAutoscalerConfig: HpaConfig
    scalingModifiers: ScalingModifiers | None = None


class ScaledObjectSpec(Part):
    scaleTargetRef: Target
    pollingInterval: int = Field(30, gt=0)
    minReplicaCount: int = Field(ge=0)
    maxReplicaCount: int
    fallback: Fallback
    advanced: Advanced
    triggers: list[Trigger] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> ScaledObjectSpec:
        if not self.minReplicaCount <= self.fallback.replicas <= self.maxReplicaCount:
            raise ValueError("fallback.replicas is not between minReplicaCount and maxReplicaCount")
        by_formula = self.fallback.behavior == "scalingModifiers"
        if by_formula and self.advanced.scalingModifiers is None:
            raise ValueError("fallback.behavior scalingModifiers needs a formula")
        return self


class ScaledObject(Part):
    apiVersion: Literal["keda.sh/v1alpha1"]
    kind: Literal["ScaledObject"]
    metadata: Metadata
    spec: ScaledObjectSpec

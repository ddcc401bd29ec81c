"""Rules for the Ray cluster, its controllers, and what Kueue is told of them."""

from __future__ import annotations

import re
from collections import Counter

from k8s.check.model import (
    CONTROLLER,
    Found,
    Object,
    Objects,
    environment,
    name_of,
    of_kind,
    pods,
    quantity,
    ray_specs,
    rule,
    selects,
)

DNS_1035 = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"


@rule('names are letters, digits and dashes, a letter first; the head has num-cpus "0"; groups differ in name')
def ray_names_are_labels(objects: Objects) -> Found:
    for where, cluster, spec in ray_specs(objects):
        if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield where, "its head runs ranks"
        groups = [group["groupName"] for group in spec.get("workerGroupSpecs", [])]
        for name in (cluster, *groups):
            if not DNS_1035.fullmatch(name):
                yield where, f"{name} is no DNS-1035 label"
        for name, count in Counter(groups).items():
            if count > 1:
                yield where, f"two groups are called {name}"


FLEET = "TUNEYARD_FLEET"


def fleets(objects: Objects) -> set[str]:
    """The Ray clusters, as NAMESPACE/NAME, whose size a controller changes."""
    containers = (item["spec"]["template"]["spec"]["containers"][0] for item in of_kind(objects, "Deployment"))
    return {str(one[FLEET]) for one in (environment(container, objects) for container in containers) if FLEET in one}


def full_name(item: Object) -> str:
    return f"{item['metadata'].get('namespace')}/{item['metadata']['name']}"


@rule("TUNEYARD_FLEET names a RayCluster that is there, with bounds to move between, without an autoscaler and Kueue")
def fleets_may_move(objects: Objects) -> Found:
    there = {full_name(item): item for item in of_kind(objects, "RayCluster")}
    for name in fleets(objects):
        item = there.get(name)
        if item is None:
            yield name, "is no RayCluster here"
            continue
        groups = item["spec"].get("workerGroupSpecs", [])
        if all(group.get("minReplicas") == group.get("maxReplicas") for group in groups):
            yield name, "no group may change its size"
        if item["spec"].get("enableInTreeAutoscaling"):
            yield name, "two would change its size: Ray's autoscaler and the fleet"
        if QUEUE in item["metadata"].get("labels", {}):
            yield name, "Kueue admits a fixed number of pods"
        roles = [
            set(one["verbs"])
            for role in of_kind(objects, "Role")
            for one in role["rules"]
            if "rayclusters" in one["resources"] and item["metadata"]["name"] in one.get("resourceNames", [])
        ]
        if not any({"get", "watch", "patch"} <= verbs for verbs in roles):
            yield name, "no Role lets the controller get, watch and patch it"


@rule(
    "unless a fleet or an autoscaler moves it replicas, minReplicas and maxReplicas are the same; else replicas between"
)
def ray_groups_have_a_size(objects: Objects) -> Found:
    moved = {name.partition("/")[2] for name in fleets(objects)}
    for where, cluster, spec in ray_specs(objects):
        for group in spec.get("workerGroupSpecs", []):
            low, now, high = (group.get(key) for key in ("minReplicas", "replicas", "maxReplicas"))
            if None in (low, now, high) or not low <= now <= high:
                yield where, f"{group['groupName']}: {low} <= {now} <= {high} does not hold"
            elif not spec.get("enableInTreeAutoscaling") and cluster not in moved and low != high:
                yield where, f"{group['groupName']}: nothing changes its size between {low} and {high}"


@rule("autoscalerOptions.version: v2 and restartPolicy Never on head and workers; not together with Kueue")
def autoscaler_is_v2(objects: Objects) -> Found:
    for where, _, spec in ray_specs(objects):
        if not spec.get("enableInTreeAutoscaling"):
            if "autoscalerOptions" in spec:
                yield where, "autoscalerOptions without enableInTreeAutoscaling"
            continue
        if spec.get("autoscalerOptions", {}).get("version") != "v2":
            yield where, "the autoscaler is not v2"
        groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]
        for group in groups:
            if group["template"]["spec"].get("restartPolicy") != "Never":
                yield where, f"{group.get('groupName', 'head')}: a pod that ends would be started again by the kubelet"
    for item in of_kind(objects, "RayCluster"):
        if item["spec"].get("enableInTreeAutoscaling") and QUEUE in item["metadata"].get("labels", {}):
            yield name_of(item), "Kueue admits a fixed number of pods"


@rule("authOptions: {mode: token, secretName: tuneyard-secrets}; the controller gets the same token as RAY_AUTH_TOKEN")
def ray_asks_for_a_token(objects: Objects) -> Found:
    for where, _, spec in ray_specs(objects):
        if spec.get("authOptions", {}).get("mode") != "token":
            yield where, "whoever reaches Ray may run anything on it"
    for item in of_kind(objects, "Deployment"):
        text = str(item["spec"]["template"]["spec"]["containers"][0].get("args", ""))
        variables = environment(item["spec"]["template"]["spec"]["containers"][0], objects)
        if "ray://" in text and (variables.get("RAY_AUTH_MODE") != "token" or "RAY_AUTH_TOKEN" not in variables):
            yield name_of(item), "has no token for Ray"


@rule("take redisPassword from a Secret, give an externalStorageNamespace, and leave Redis variables to the operator")
def redis_has_a_password(objects: Objects) -> Found:
    for where, _, spec in ray_specs(objects):
        options = spec.get("gcsFaultToleranceOptions")
        if options is None:
            continue
        if "secretKeyRef" not in options.get("redisPassword", {}).get("valueFrom", {}):
            yield where, "Redis is asked without a password"
        if not options.get("externalStorageNamespace"):
            yield where, "two clusters on one Redis would mix"
        head = spec["headGroupSpec"]
        given = {one["name"] for one in head["template"]["spec"]["containers"][0].get("env", [])}
        for name in given & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "REDIS_USERNAME"}:
            yield where, f"the head has {name}, which the operator sets"


@rule("put components that change the first group before those that copy it")
def ray_groups_are_alike(objects: Objects) -> Found:
    for where, _, spec in ray_specs(objects):
        groups = spec.get("workerGroupSpecs", [])
        for group in groups[1:]:
            for key in ("env", "envFrom", "volumeMounts", "lifecycle", "securityContext"):
                mine, first = (one["template"]["spec"]["containers"][0].get(key) for one in (group, groups[0]))
                if mine != first:
                    yield where, f"{group['groupName']} has another {key} than {groups[0]['groupName']}"


@rule("a group whose pods say they are in a rack has a nodeSelector for that rack, and the other way round")
def racks_are_where_they_say(objects: Objects) -> Found:
    for where, _, spec in ray_specs(objects):
        for group in spec.get("workerGroupSpecs", []):
            told = group.get("labels", {}).get("tuneyard.io/rack")
            selector = group["template"]["spec"].get("nodeSelector", {}).get("tuneyard.io/rack")
            if told != selector:
                yield where, f"{group['groupName']} says rack {told} and is placed in {selector}"
            if "labels" in group.get("rayStartParams", {}):
                yield where, f"{group['groupName']}: rayStartParams has no labels; the group has"


@rule("preStop runs evacuate with a --grace below terminationGracePeriodSeconds; TUNEYARD_HOME is the controller's")
def drains_save(objects: Objects) -> Found:
    homes = {
        environment(pod.spec["containers"][0], objects).get("TUNEYARD_HOME")
        for pod in pods(objects)
        if pod.labels.get("app.kubernetes.io/name") == CONTROLLER
    }
    for pod in pods(objects):
        if pod.role != "worker":
            continue
        container = pod.spec["containers"][0]
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if "orchestrator.execute.evacuate" not in command or "--grace" not in command[:-1]:
            yield pod.owner, "what trains there does not save when the pod has to go"
            continue
        grace = float(command[command.index("--grace") + 1])
        if grace >= pod.spec.get("terminationGracePeriodSeconds", 30):
            yield pod.owner, f"is killed before the {grace:.0f} s of its preStop hook are over"
        home = environment(container, objects).get("TUNEYARD_HOME")
        if homes and home not in homes:
            yield pod.owner, f"looks for attempts in {home}; the controller puts them in {homes}"


@rule("a budget has to let one pod go: minAvailable below the number of pods, or maxUnavailable of 1 and more")
def budgets_let_go(objects: Objects) -> Found:
    for item in of_kind(objects, "PodDisruptionBudget"):
        chosen = [pod for pod in pods(objects) if selects(item["spec"]["selector"], pod.labels)]
        least, most = item["spec"].get("minAvailable"), item["spec"].get("maxUnavailable")
        if any(pod.role for pod in chosen) and not isinstance(least, int):
            yield name_of(item), "pods of a custom resource take a whole minAvailable alone"
            continue
        stuck = least >= sum(pod.replicas for pod in chosen) if isinstance(least, int) else most in (0, "0%", None)
        if stuck:
            yield name_of(item), "a drain of the node would wait for ever"


@rule("several controllers take PostgreSQL (TUNEYARD_DATABASE_URL), RollingUpdate and a budget")
def controllers_share_a_database(objects: Objects) -> Found:
    for item in of_kind(objects, "Deployment"):
        template = item["spec"]["template"]
        if template["metadata"]["labels"].get("app.kubernetes.io/name") != CONTROLLER:
            continue
        several = item["spec"].get("replicas", 1) > 1
        if several and "TUNEYARD_DATABASE_URL" not in environment(template["spec"]["containers"][0], objects):
            yield name_of(item), "two of them would have a file for a database"
        if several and item["spec"].get("strategy", {}).get("type") != "RollingUpdate":
            yield name_of(item), "both would be away in an update"
        budgets = of_kind(objects, "PodDisruptionBudget")
        labels = template["metadata"]["labels"]
        if several and not any(selects(one["spec"]["selector"], labels) for one in budgets):
            yield name_of(item), "a drain may take both"


@rule("queue-name is a LocalQueue; clusterQueue, flavors and topology are there; leave spec.suspend to Kueue")
def kueue_names_resolve(objects: Objects) -> Found:
    def names(kind: str) -> set[str]:
        return {item["metadata"]["name"] for item in of_kind(objects, kind)}

    for item in of_kind(objects, "RayCluster", "RayJob"):
        labels = item["metadata"].get("labels", {})
        if QUEUE not in labels:
            continue
        if labels[QUEUE] not in names("LocalQueue"):
            yield name_of(item), f"LocalQueue {labels[QUEUE]} is not there"
        if labels.get(PRIORITY) not in {None, *names("WorkloadPriorityClass")}:
            yield name_of(item), f"WorkloadPriorityClass {labels[PRIORITY]} is not there"
        if "suspend" in item["spec"]:
            yield name_of(item), "spec.suspend is Kueue's"
        if item["kind"] == "RayJob" and item["spec"].get("shutdownAfterJobFinishes") is not True:
            yield name_of(item), "it would hold its quota after it has ended"
        if item["kind"] == "RayJob" and "clusterSelector" in item["spec"]:
            yield name_of(item), "Kueue does not admit jobs for a cluster that is there"
    for item in of_kind(objects, "LocalQueue"):
        if item["spec"].get("clusterQueue") not in names("ClusterQueue"):
            yield name_of(item), f"ClusterQueue {item['spec'].get('clusterQueue')} is not there"
    for item in of_kind(objects, "ResourceFlavor"):
        spec = item.get("spec", {})
        if spec.get("topologyName") not in {None, *names("Topology")}:
            yield name_of(item), f"Topology {spec['topologyName']} is not there"
        if "topologyName" in spec and not spec.get("nodeLabels"):
            yield name_of(item), "a flavor with a topology says which nodes it is of (nodeLabels)"
    for item in of_kind(objects, "ClusterQueue"):
        for group in item["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                if flavor["name"] not in names("ResourceFlavor"):
                    yield name_of(item), f"ResourceFlavor {flavor['name']} is not there"
                if [one["name"] for one in flavor["resources"]] != group["coveredResources"]:
                    yield name_of(item), f"{flavor['name']} does not list the covered resources in their order"


@rule("the cluster queue's nominal quota holds head and workers: raise it with the groups")
def kueue_quota_holds_the_cluster(objects: Objects) -> Found:
    queues = {item["metadata"]["name"]: item["spec"].get("clusterQueue") for item in of_kind(objects, "LocalQueue")}
    quotas: dict[str, Counter[str]] = {}
    for item in of_kind(objects, "ClusterQueue"):
        total = quotas.setdefault(item["metadata"]["name"], Counter())
        for group in item["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                total.update({one["name"]: quantity(one["nominalQuota"]) for one in flavor["resources"]})
    for item in of_kind(objects, "RayCluster"):
        queue = queues.get(item["metadata"].get("labels", {}).get(QUEUE, ""))
        if queue not in quotas:
            continue
        for name, amount in requested(item).items():
            if amount > quotas[queue][name]:
                yield f"ClusterQueue/{queue}", f"{name}: {amount:g} asked for, {quotas[queue][name]:g} there"


def requested(cluster: Object) -> dict[str, float]:
    """What all pods of a Ray cluster ask for together."""
    total: dict[str, float] = {}
    for pod in pods([cluster]):
        for container in pod.containers:
            for name, amount in container.get("resources", {}).get("requests", {}).items():
                total[name] = total.get(name, 0.0) + quantity(amount) * pod.replicas
    return total

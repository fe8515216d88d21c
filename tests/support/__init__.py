"""What several test files share; nothing here is a test.

* jobs.py: trainings on the CPU, as real processes, as forks that have torch, and in this process.
* small_bundles.py: bundles of random weights. sampling_reference.py, neural_cache_reference.py: sampling and the neural cache,
  written plainly as references.
* failures.py: how a command fails, its exit code and its one line.
* mutations.py: damaged and hostile files from a seed.
* manifests.py, manifest_*.py: the manifests of k8s/, rendered, with the rules that they obey and wrong changes of them.
* hosts.py, pods.py, cluster.py: hosts, pods and a Job controller on this machine, from network namespaces and bubblewrap.
* dockerfiles.py: a stage of a Dockerfile, executed without docker.
"""

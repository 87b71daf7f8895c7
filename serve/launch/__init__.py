"""The start of a server: its plan, its command line, its process, and its description for Kubernetes and Ray."""

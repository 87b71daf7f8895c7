"""The jobs of the public interface, one file a job."""

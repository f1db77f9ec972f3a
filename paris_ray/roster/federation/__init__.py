"""A federation: sites with clusters and corpora of their own train the experts of one bundle.

    found     the coordinator writes a folder that is given to all: encoders, centroids, a router
    join      a site makes a run of its own of it
    submit    the site packs its experts and what the router needs
    assemble  the coordinator makes the bundle

Folders travel by whatever means the sites have; each is signed, and read as a stranger's. What
nobody hands over unless they say so: rows and words. docs/federation.md tells what is learnt
about a site from what it does hand over.
"""

from paris_ray.roster.federation.assemble import assemble
from paris_ray.roster.federation.found import found
from paris_ray.roster.federation.join import SITE_CONFIG, join
from paris_ray.roster.federation.submit import submit
from paris_ray.roster.federation.terms import Site

__all__ = ["SITE_CONFIG", "Site", "assemble", "found", "join", "submit"]

# Reads a seed with cloud-init's own data source. The kernel of a machine for tests may not
# know ISO 9660: so isoinfo extracts the files of a seed by their Rock Ridge or Joliet names,
# in place of mount(8). Arguments: the seed, -R or -J.
import json, os, subprocess, sys, tempfile

from cloudinit import helpers, settings, util
from cloudinit.sources import DataSourceNoCloud as nocloud

seed, names = sys.argv[1:3]


def mount_cb(device, callback, data=None, **kwargs):
    assert device == seed, device
    with tempfile.TemporaryDirectory() as there:
        listing = subprocess.check_output(["isoinfo", names, "-f", "-i", seed], text=True)
        for name in listing.split():
            content = subprocess.check_output(["isoinfo", names, "-i", seed, "-x", name])
            with open(os.path.join(there, os.path.basename(name)), "wb") as out:
                out.write(content)
        return callback(there, data) if data is not None else callback(there)


def find_devs_with(criteria=None, **kwargs):
    label = subprocess.check_output(["blkid", "-p", "-o", "value", "-s", "LABEL", seed], text=True).strip()
    kind = subprocess.check_output(["blkid", "-p", "-o", "value", "-s", "TYPE", seed], text=True).strip()
    return [seed] if criteria in ("LABEL=" + label, "TYPE=" + kind) else []


nocloud.util.mount_cb = mount_cb
nocloud.util.find_devs_with = find_devs_with
nocloud.dmi.read_dmi_data = lambda key: None
with tempfile.TemporaryDirectory() as run:
    source = nocloud.DataSourceNoCloud(dict(settings.CFG_BUILTIN), None, helpers.Paths({"cloud_dir": run, "run_dir": run, "templates_dir": run}))
    source.distro = None
    assert source._get_data(), "the data source found nothing"
    print(json.dumps({
        "instance_id": source.get_instance_id(),
        "hostname": source.metadata.get("local-hostname"),
        "keys": source.get_public_ssh_keys(),
        "user_data": util.decode_binary(source.get_userdata_raw()),
        "network": source.network_config,
    }))

package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/hosttls"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/sandbox"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// receiveFlags are the flags of govmm receive.
type receiveFlags struct {
	hostFlags
	deviceFlags
	backing    string
	diskDir    string
	trustPaths bool
	listen     string
	insecure   bool
	tlsDir     string
	allow      []string

	allowed []hosttls.Pattern
	tcp     *net.TCPAddr // listen, looked up by check; nil: unix:PATH
}

func newReceive() *cobra.Command {
	var f receiveFlags
	var here []virtio.Spec
	cmd := &cobra.Command{
		Use:   "receive [NAME] --listen HOST:PORT|unix:PATH",
		Short: "Wait for a guest that is migrated here, and then run it",
		Long: `Wait for a guest that is migrated here, and then run it as govmm run does.

The guest keeps its CPUs, memory and devices. What its devices use of this host
(disks, taps, a socket) is only what flags give here, one for each device in
their order; a guest that needs more is refused, with the flags that it needs. With
--disk-dir its disks come along, as new files there that have their names when the
guest runs here. With
--allow-source-paths it gets whatever the source names, as root perhaps any file
of this host: for hosts that trust each other. A disk must be the same one, on
storage that both hosts reach. Port 0 takes any free port; the address that is
printed is the one for govmm migrate --to. After an attempt that fails it waits
for the next.

With --tls-dir a source needs a certificate that an authority in ca.pem has
signed, and --tls-allow says for which names. Without TLS anybody who can connect
can send a guest: then it listens on loopback addresses and unix sockets only,
unless --insecure says otherwise. A unix socket is for processes of this user and
of root, a tunnel's end for example.`,
		Args: oneName,
		PreRunE: func(cmd *cobra.Command, _ []string) error {
			return f.prepare(cmd, func() (err error) {
				if err = f.check(); err == nil {
					here, err = f.devices()
				}
				if err != nil {
					return usagef(cmd, "%v", err)
				}
				return nil
			})
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.host(cmd, args, func(h host) (*vmm.VM, error) {
				config, err := f.tlsConfig(h)
				if err != nil {
					return nil, err
				}
				ln, err := f.open(h)
				if err != nil {
					return nil, err
				}
				reader, err := readerFor(f.mayBootDisk(here))
				if err != nil {
					return nil, errors.Join(err, ln.Close())
				}
				vm, err := vmm.NewReceiver(vmm.ReceiveConfig{Name: h.name, Listener: ln, TLS: config, Serial: h.serial, Console: h.console,
					Devices: here, AllowSourcePaths: f.trustPaths, DiskDir: f.diskDir, Backing: memory.Backing(f.backing), Tracking: machine.DirtyTracking(f.tracking), Overcommit: f.overcommit, DiskReader: reader, Log: h.log})
				if err != nil {
					return nil, errors.Join(err, ln.Close())
				}
				return vm, nil
			}, func() ([]virtio.Spec, sandbox.Policy) {
				policy := laterOf(here, true)
				policy.Kill = f.mayBootDisk(here)
				policy.Missing = true
				if f.diskDir != "" {
					policy.Write, policy.Replace = append(policy.Write, f.diskDir), append(policy.Replace, f.diskDir)
				}
				if f.trustPaths { // whatever the source names is opened when it comes
					policy.AllFiles, policy.Listen, policy.Netlink, policy.Keep = true, true, true, []int{unix.CAP_NET_ADMIN}
				}
				return here, f.later(policy)
			})
		},
	}
	f.hostFlags.register(cmd)
	cmd.Flags().BoolVar(&f.json, "json", false, "print a JSON object when it listens, with the address, and one when the guest has arrived")
	f.registerReceive(cmd.Flags())
	cmd.Flags().BoolVar(&f.trustPaths, "allow-source-paths", false, "let a source name the disks, taps, bridges and sockets of this host, and take its huge pages: where no flag gives others, the same names as at the source")
	cmd.Flags().StringVar(&f.diskDir, "disk-dir", "", "copy the guest's disks to new files in this `DIR`, instead of --disk; the source needs --copy-disks")
	cmd.Flags().StringVar(&f.backing, "memory-backing", "", "`KIND` of host memory: anonymous, memfd or hugetlb; none: as at the source, unless that is hugetlb")
	cmd.Flags().StringVar(&f.listen, "listen", "", "`ADDRESS` to wait at: HOST:PORT (no HOST: every address of this host) or unix:PATH")
	registerTLSDir(cmd, &f.tlsDir)
	cmd.Flags().StringArrayVar(&f.allow, "tls-allow", nil,
		"`PATTERN` of the DNS names and addresses in certificates that may send a guest: NAME, *.DOMAIN, ADDRESS or ADDRESS/BITS; may be repeated")
	cmd.Flags().BoolVar(&f.insecure, "insecure", false, "without TLS, listen on other addresses than loopback ones too: whoever reaches them can send a guest, and read or change one that comes")
	return cmd
}

// check reports the first flag that makes no sense.
func (f *receiveFlags) check() error {
	if f.listen == "" {
		return fmt.Errorf("--listen HOST:PORT is missing; 127.0.0.1:0 takes any free port of this host")
	}
	if err := f.hostFlags.check(); err != nil {
		return err
	}
	if f.json && (f.serial == "stdio" || f.console == "stdio") {
		return errors.New("--json: the guest writes to stdout; use --serial null, file:PATH or unix:PATH")
	}
	if _, err := memory.ParseBacking(f.backing); f.backing != "" && err != nil {
		return fmt.Errorf("--memory-backing: %w", err)
	}
	if err := f.checkTLS(); err != nil {
		return err
	}
	if path, ok := strings.CutPrefix(f.listen, migrate.UnixPrefix); ok {
		if path == "" {
			return errors.New("--listen unix:PATH: the PATH is missing")
		}
		return nil
	}
	_, port, err := net.SplitHostPort(f.listen)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Errorf("--listen %.80q: expected HOST:PORT, with a port between 0 and 65535, or unix:PATH", f.listen)
	}
	// Once: a name that is looked up again may have another address.
	if f.tcp, err = net.ResolveTCPAddr("tcp", f.listen); err != nil {
		return fmt.Errorf("--listen %.80s: %w", f.listen, err)
	}
	if f.tlsDir == "" && !f.insecure && !f.tcp.IP.IsLoopback() {
		return fmt.Errorf("--listen %.80s: others than this host reach it, and without TLS any of them can send a guest: "+
			"give --tls-dir DIR, a loopback address or unix:PATH, or --insecure", f.listen)
	}
	return nil
}

func (f *receiveFlags) checkTLS() (err error) {
	switch {
	case f.tlsDir == "" && len(f.allow) > 0:
		return errors.New("--tls-allow needs --tls-dir DIR")
	case f.tlsDir != "" && f.insecure:
		return fmt.Errorf("--insecure and --tls-dir (or %s) exclude each other", tlsDirVariable)
	}
	f.allowed, err = allowed(f.allow)
	return err
}

// tlsConfig reads the files of --tls-dir, nil if there is none.
func (f *receiveFlags) tlsConfig(h host) (config *tls.Config, err error) {
	if f.tlsDir == "" {
		return nil, nil
	}
	err = h.user.do(func() error { // who reads them again later
		s, err := hosttls.NewServer(f.tlsDir, f.allowed, h.log)
		if err != nil {
			return fmt.Errorf("--tls-dir: %w", err)
		}
		config = s.Config()
		return nil
	})
	return config, err
}

// later adds to a policy what the receiver needs for connections.
func (f *receiveFlags) later(policy sandbox.Policy) sandbox.Policy {
	if f.tlsDir != "" {
		policy.Read = append(policy.Read, f.tlsDir)                      // files that change are read again
		for _, name := range []string{"ca.pem", "cert.pem", "key.pem"} { // they may be links
			if path, err := filepath.EvalSymlinks(filepath.Join(f.tlsDir, name)); err == nil {
				policy.Read = append(policy.Read, filepath.Dir(path))
			}
		}
	}
	if f.tcp == nil {
		policy.Remove = append(policy.Remove, filepath.Dir(strings.TrimPrefix(f.listen, migrate.UnixPrefix)))
	}
	return policy
}

// open makes the listener.
func (f *receiveFlags) open(h host) (ln net.Listener, err error) {
	if f.tcp == nil {
		err = h.user.do(func() error { // who removes it
			ln, err = migrate.ListenUnix(strings.TrimPrefix(f.listen, migrate.UnixPrefix))
			return err
		})
		return ln, err
	}
	if f.insecure && !f.tcp.IP.IsLoopback() {
		h.log.Warn("--insecure: whoever reaches this address can send a guest, and read or change one that comes", "listen", f.listen)
	}
	return net.ListenTCP("tcp", f.tcp)
}

package sandbox

import (
	"fmt"
	"os"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
)

// landlockABI is the newest version of Landlock's interface whose rights are used.
const landlockABI = 7

// scoped leaves signals out: the kernels that know this scope first (6.12 to 6.14) take
// each thread for a domain of its own, and threads signal each other. The filter of
// system calls has that rule.
const scoped = landlock.ScopedSet(ll.ScopeAbstractUnixSocket)

const (
	writeRights   = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSWriteFile | ll.AccessFSTruncate | ll.AccessFSIoctlDev)
	replaceRights = landlock.AccessFSSet(ll.AccessFSReadDir | ll.AccessFSWriteFile | ll.AccessFSTruncate | ll.AccessFSMakeReg | ll.AccessFSRemoveFile)
)

// restrictFiles leaves only the files, ports and abstract sockets of the policy.
func (p Policy) restrictFiles(s *Status) error {
	abi, err := ll.LandlockGetABIVersion()
	if err != nil {
		return p.lacks(s, "Landlock", err, "files and TCP ports are not restricted")
	}
	s.Landlock = min(abi, landlockABI)
	for _, need := range []struct {
		abi  int
		what string
	}{
		{3, "truncation of files"},
		{4, "TCP ports"},
		{5, "ioctl of devices"},
		{6, "abstract unix sockets"},
	} {
		if abi < need.abi {
			s.Missing = append(s.Missing, fmt.Sprintf("Landlock %d (%s)", need.abi, need.what))
		}
	}
	var rules []landlock.Rule
	config := landlock.Config{HandledAccessNet: landlock.V4.HandledAccessNet, Scoped: scoped}
	if p.Ports == nil {
		config.HandledAccessNet = ll.AccessNetBindTCP
	}
	for _, port := range p.Ports {
		rules = append(rules, landlock.ConnectTCP(port))
	}
	for _, port := range p.Bind {
		rules = append(rules, landlock.BindTCP(port))
	}
	if !p.AllFiles {
		config.HandledAccessFS = landlock.V5.HandledAccessFS
		rules = append(rules, p.files()...)
	}
	if err := config.BestEffort().Restrict(rules...); err != nil {
		return fmt.Errorf("restrict files and ports: %w", err)
	}
	return nil
}

// files are the rules for files.
func (p Policy) files() []landlock.Rule {
	replace := replaceRights
	if p.Listen {
		replace |= ll.AccessFSMakeSock
	}
	rules := []landlock.Rule{landlock.PathAccess(replace, p.Replace...).IgnoreIfMissing(),
		landlock.PathAccess(ll.AccessFSRemoveFile, p.Remove...).IgnoreIfMissing(),
		landlock.PathAccess(writeRights, p.Write...).IgnoreIfMissing()}
	for _, path := range p.Read {
		rights := landlock.AccessFSSet(ll.AccessFSReadFile)
		if st, err := os.Stat(path); err == nil && st.IsDir() {
			rights |= ll.AccessFSReadDir
		}
		rules = append(rules, landlock.PathAccess(rights, path).IgnoreIfMissing())
	}
	return rules
}

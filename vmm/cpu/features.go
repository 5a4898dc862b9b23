package cpu

import (
	"fmt"
	"strings"

	"github.com/govmm/govmm/kvm"
)

// featureWord is a register of a CPUID leaf in which each bit is a feature. A guest
// that has seen the bit may use the feature.
type featureWord struct {
	function, index uint32
	register        string
	value           func(kvm.CPUIDEntry) uint32
	names           string // of bits 0, 1, ...; - has none
}

func eax(e kvm.CPUIDEntry) uint32 { return e.Eax }
func ebx(e kvm.CPUIDEntry) uint32 { return e.Ebx }
func ecx(e kvm.CPUIDEntry) uint32 { return e.Ecx }
func edx(e kvm.CPUIDEntry) uint32 { return e.Edx }

// featureWords uses the names of /proc/cpuinfo where Linux has one.
var featureWords = []featureWord{
	{leafFeatures, 0, "ECX", ecx, "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm " +
		"- pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"},
	{leafFeatures, 0, "EDX", edx, "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov " +
		"pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"},
	{leafPower, 0, "EAX", eax, "dtherm ida arat"},
	{leafExtended, 0, "EBX", ebx, "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a " +
		"avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"},
	{leafExtended, 0, "ECX", ecx, "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq - " +
		"la57 - - - - - rdpid kl bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks"},
	{leafExtended, 0, "EDX", edx, "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - tsx_force_abort serialize hybrid " +
		"tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd"},
	{leafExtended, 1, "EAX", eax, "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - " +
		"- fred lkgs wrmsrns nmi_source amx_fp16 hreset avx_ifma - - lam msrlist"},
	{leafExtended, 1, "EBX", ebx, ""},
	{leafExtended, 1, "ECX", ecx, ""},
	{leafExtended, 1, "EDX", edx, "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - " +
		"- uiret_uif cet_sss avx10"},
	{leafExtended, 2, "EDX", edx, "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"},
	{leafXState, 0, "EAX", eax, "x87-state sse-state avx-state bndregs-state bndcsr-state opmask-state zmm_hi256-state hi16_zmm-state pt-state pkru-state pasid-state cet_u-state cet_s-state hdc-state uintr-state lbr-state " +
		"hwp-state tilecfg-state tiledata-state"},
	{leafXState, 0, "EDX", edx, ""},
	{leafXState, 1, "EAX", eax, "xsaveopt xsavec xgetbv1 xsaves xfd"},
	{leafXState, 1, "ECX", ecx, ""},
	{leafXState, 1, "EDX", edx, ""},
	{leafKVMFeatures, 0, "EAX", eax, "kvmclock kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id " +
		"kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvmclock_stable"},
	{leafAMDFeatures, 0, "ECX", ecx, "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp " +
		"fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx"},
	{leafAMDFeatures, 0, "EDX", edx, "- - - - - - - - - - - syscall - - - - " +
		"- - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"},
	{leafAMDPower, 0, "EDX", edx, "- - - - - - - hw_pstate constant_tsc cpb"},
	{leafAMDSizes, 0, "EBX", ebx, "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs amd_stibp " +
		"ibrs_always_on stibp_always_on ibrs_preferred ibrs_same_mode - - - ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret"},
	{leafAMDFeatures2, 0, "EAX", eax, "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr - - - - - - " +
		"- prefetchi - - - - - - - - - sbpb ibpb_brtype srso_no srso_user_kernel_no"},
}

// String names the register.
func (w featureWord) String() string {
	if w.function == leafExtended || w.function == leafXState {
		return fmt.Sprintf("CPUID %#x.%d %s", w.function, w.index, w.register)
	}
	return fmt.Sprintf("CPUID %#x %s", w.function, w.register)
}

// bitNames names the bits that are set in mask; one without a name by its number.
func (w featureWord) bitNames(mask uint32) string {
	names := strings.Fields(w.names)
	var out []string
	for bit := range 32 {
		switch {
		case mask&(1<<bit) == 0:
		case bit < len(names) && names[bit] != "-":
			out = append(out, names[bit])
		default:
			out = append(out, fmt.Sprintf("bit %d", bit))
		}
	}
	return strings.Join(out, ", ")
}
